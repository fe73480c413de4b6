"""Edits of a living network: plans, surgery, history and the way back."""
