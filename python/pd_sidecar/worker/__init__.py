"""The connector's half in each worker."""
