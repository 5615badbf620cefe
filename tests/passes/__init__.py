"""Tests of the graph passes: one module a pass."""
