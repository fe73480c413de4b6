"""Callbacks for the trainers that people use. Each needs its extra: `pip install pilimit[lightning]` or
`pilimit[huggingface]`."""
