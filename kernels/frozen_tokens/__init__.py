"""Tokens where nothing is recorded: one kernel for what training makes in several passes over all
tokens. What they mean is the plain PyTorch of `pipeline/model/tokens.py`.
"""
