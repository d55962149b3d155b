"""The connector's half in the engine's scheduler."""
