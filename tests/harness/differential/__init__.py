"""The differential suite: requests that one plain vLLM and the proxy must answer alike."""
