"""Starts real processes for tests, the demo and the benchmarks: engines, sidecars, the proxy."""
