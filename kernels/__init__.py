"""Operators: one folder each, with schema, reference and the implementations. They import torch alone."""
