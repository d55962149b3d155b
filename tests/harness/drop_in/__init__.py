"""Senders and receivers for the tests beside real LMCache, with the data that they move."""
