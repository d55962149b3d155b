"""KV in a store (`pd-store`): the client of a store, and the tier that vLLM's OffloadingConnector loads."""
