"""Senders and receivers for the tests with real LMCache, and the data that they move."""
