"""Recommended lists online: history, retrieval, one ranking pass, choice."""
