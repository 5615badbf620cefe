"""Tests of the kernels: one module an operator."""
