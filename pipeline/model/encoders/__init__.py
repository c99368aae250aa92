"""Sequence encoders to compare ULTRA-HSTU with: same tokens, heads, loss, data and trainer
(`model.encoder`).
"""
