"""Tests of the benchmarks: that they run, and that they say nothing about what is wrong."""
