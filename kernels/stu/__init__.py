"""A whole STU layer as one autograd function: what is kept for backward, and what is computed again."""
