"""What needs GPUs: tests and the benchmark against the baselines."""
