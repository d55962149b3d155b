"""The unix socket between engine and sidecar: messages, connection, start of the sidecar."""
