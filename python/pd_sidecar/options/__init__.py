"""The connector's options, and the settings of LMCache that it reads."""
