"""Tests that need GPUs, and the benchmark against the baselines."""
