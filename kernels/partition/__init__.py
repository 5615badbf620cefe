"""Rows of a key cache, put into another order in place."""
