"""Lists of items for users: retrieve from the index, rank by the model, choose.

history → sources (model, followed, popular) → candidates → scores → diversify → list
"""
