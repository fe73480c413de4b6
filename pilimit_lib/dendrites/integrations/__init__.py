"""Callbacks for the trainers that people use. They need the extra: `pip install
'pilimit[dendrites]'`."""
