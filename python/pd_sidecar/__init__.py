"""The Python side of the pd-sidecar: a vLLM connector and a small client of the local socket.

`pd_sidecar.client` needs only the standard library and msgspec. vLLM loads `pd_sidecar.connector`
(`kv_connector_module_path`).
"""

__version__ = "0.1.0"
