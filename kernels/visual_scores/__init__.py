"""Scores of keys by the last rows of a prompt."""
