"""Benchmarks of this project against baselines.

Each benchmark alternates between the two in one run, so that a busy machine disturbs both equally.
"""
