"""Benchmarks of this project against baselines.

Each benchmark alternates between this project and the baseline in one run, so that a busy machine affects both equally.
"""
