"""Benchmarks: ours and a baseline, alternating in one run, so that a busy machine disturbs both alike."""
