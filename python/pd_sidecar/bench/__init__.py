"""The command `pd-bench`: sends a load to OpenAI-compatible servers, measures the answers and compares servers."""
