"""Reads chunk-key settings that were made for LMCache, so that the same command line gives the same keys.

The precedence is LMCache's own: `lmcache.<key>` in the connector's options overrides the variable `LMCACHE_<KEY>`, and
the variable overrides the file that `LMCACHE_CONFIG_FILE` names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE_VARIABLE = "LMCACHE_CONFIG_FILE"
PREFIX = "lmcache."

HASH_KEY = "pre_caching_hash_algorithm"
CHUNK_KEY = "chunk_size"

HARMLESS: dict[str, str] = {
    "discard_partial_chunks": "the partial last chunk always moves",
    "lmcache_rpc_port": "scheduler and worker use no port",
    "skip_last_n_tokens": "the decode request has the same tokens as the prefill request",
}
"""LMCache's options that change nothing in this connector, each with the reason."""


@dataclass(frozen=True)
class Setting:
    """A value, with the setting that it comes from."""

    value: Any
    source: str


def settings(extra: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Setting]:
    """Returns `hash_algorithm` and `chunk_size` as LMCache would set them, if LMCache is configured at all.

    Raises `ValueError` for a file that cannot be read.
    """
    path = environ.get(FILE_VARIABLE, "")
    file = _file(path) if path else {}
    out: dict[str, Setting] = {}
    for key, option, default in (
        (HASH_KEY, "hash_algorithm", "builtin"),
        (CHUNK_KEY, "chunk_size", 256),
    ):
        variable = f"LMCACHE_{key.upper()}"
        if PREFIX + key in extra:
            out[option] = Setting(extra[PREFIX + key], PREFIX + key)
        elif environ.get(variable):
            out[option] = Setting(environ[variable].strip("\"'"), variable)
        elif file.get(key) is not None:
            out[option] = Setting(file[key], f"{path}: {key}")
        elif path:
            out[option] = Setting(default, f"{path} does not set {key}, so LMCache's default applies")
    if "chunk_size" in out:
        out["chunk_size"] = _number(out["chunk_size"])
    return out


def variables(extra: Mapping[str, Any]) -> dict[str, str]:
    """Returns the environment variables that pass `lmcache.<key>` options to a sidecar."""
    return {
        f"LMCACHE_{key.removeprefix(PREFIX).upper()}": _text(value)
        for key, value in extra.items()
        if key.startswith(PREFIX)
    }


def _file(path: str) -> dict[str, Any]:
    import yaml  # vLLM depends on it

    try:
        with Path(path).open(encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{FILE_VARIABLE}={path} cannot be read: {error}") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{FILE_VARIABLE}={path} must contain a mapping of keys to values")
    return values or {}


def _number(given: Setting) -> Setting:
    try:
        return Setting(int(str(given.value)), given.source)
    except ValueError:
        raise ValueError(f"{given.source}: {given.value!r} is not a whole number") from None


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
