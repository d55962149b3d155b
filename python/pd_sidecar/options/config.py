"""The connector's options: `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pd_sidecar.client import default_socket
from pd_sidecar.kv.keys import refusal
from pd_sidecar.options import lmcache, own_sidecar

if TYPE_CHECKING:
    from collections.abc import Mapping


class ConfigError(ValueError):
    """All errors in the options. Each text names the key, the value and what the value must be."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("pd_sidecar: " + "; ".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Options:
    """The keys of `kv_connector_extra_config`."""

    sender_socket: str = ""
    """Unix socket of the sidecar that pushes (kv_producer, kv_both). Default: `default_socket`."""
    receiver_socket: str = ""
    """Unix socket of the sidecar that receives (kv_consumer, kv_both). Default: `default_socket`."""
    model_name: str = ""
    """The model's name in keys, equal on both sides. Default: vLLM's `--model`."""
    chunk_size: int = 256
    """Tokens per chunk, equal on both sides. Default: LMCache's setting, if there is one."""
    hash_algorithm: str = "sha256_cbor"
    """`sha256_cbor`, `sha256`, or `builtin` with PYTHONHASHSEED set. Default: LMCache's setting, if there is one."""
    ranks: int = 0
    """The number of ranks into which the two sides split KV: the larger of their tensor-parallel sizes, equal on both
    sides. Default: this engine's size.
    """
    load_deadline_ms: int = 30_000
    """Milliseconds that a decode request waits for its KV. After this time this engine computes the prompt."""
    save_deadline_ms: int = 60_000
    """Milliseconds that a finished prefill request keeps its blocks while some of its chunks have no slot yet."""
    keep_ms: int = 30_000
    """Milliseconds for which a finished prefill request that names no receiver keeps its blocks if no decode side sends
    a message.
    """
    keep_share: float = 0.5
    """The largest part of the KV cache that prefill requests without a receiver may keep, 0 to 1. If a request
    would exceed this part, its KV is not kept, and the decode side computes its prompt.
    """
    push: str = "auto"
    """The moment of a gather on a GPU. `step` gathers after a step. `layers` gathers the first layers of a step while
    its last layers are computed. `auto` works like `layers` if the KV then arrives earlier over the sidecar's link;
    otherwise it works like `step`.
    """
    idle_wait_ms: float = 2.0
    """Milliseconds that an engine with nothing else to do waits for a message of the sidecar."""
    sidecar: str = ""
    """`spawn`: the engine starts its sidecar as a child. Default: `spawn` if the engine has both roles, and neither the
    options nor the environment name a sidecar.
    """
    sidecar_arguments: str = ""
    """Further arguments of a spawned sidecar, as in a shell."""
    allow_load_failure_policy_fail: bool = False
    """If true, the engine starts although vLLM would answer a failed load with HTTP 500."""
    move_draft: bool = True
    """False if only one side has a draft model: this side then leaves the draft's KV out. Its draft knows nothing of a
    prompt whose KV was moved, and guesses worse until it has seen tokens of the answer. Texts do not change.
    """
    allow_several_groups: bool = False
    """If true, the engine starts with several KV groups where this is not tested enough: on GPUs, and with versions of
    vLLM that accept no report about a failed load of several groups.
    """


def parse(
    extra: Mapping[str, Any],
    *,
    producer: bool,
    consumer: bool,
    load_failure_policy: str,
    model: str,
    engine_id: str = "",
    environ: Mapping[str, str] = os.environ,
) -> Options:
    """Returns the options with their defaults filled in. Raises `ConfigError` with all problems at once."""
    problems: list[str] = []
    both = producer and consumer
    if both and own_sidecar.is_wanted(extra, environ):
        extra = {**extra, "sidecar": "spawn"}
        if (problem := own_sidecar.problem(environ)) is not None:
            problems.append(problem)
    known = {field.name: field for field in fields(Options)}
    values: dict[str, Any] = {}
    for key, value in extra.items():
        if key in lmcache.HARMLESS:
            continue
        # These options configure a sidecar that this engine starts. A sidecar that the user starts does not get these
        # options, and runs with its defaults.
        if key.startswith(lmcache.PREFIX):
            if "sidecar" not in extra and key.removeprefix(lmcache.PREFIX) not in KEY_SETTINGS:
                problems.append(
                    f"{key}={value!r} configures the sidecar, but this engine starts no sidecar: "
                    "write it into the sidecar's file, or set sidecar to 'spawn'"
                )
            continue
        if key not in known:
            problems.append(f"{key}={value!r} is not an option; there are {', '.join(known)}")
            continue
        # `bool` is a subclass of `int` in Python, so `true` would pass as a number without the second check.
        kind = type(known[key].default)
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
            problems.append(f"{key}={value!r} must be of type {kind.__name__}")
            continue
        values[key] = value
    # LMCache's own settings apply where no option is given, so that both sides compute the same keys.
    source = {}
    try:
        for key, setting in lmcache.settings(extra, environ).items():
            if key not in values:
                values[key], source[key] = setting.value, setting.source
    except ValueError as error:
        problems.append(str(error))
    options = Options(**values)
    why = refusal(options.hash_algorithm, environ)
    if why is not None:
        named = source.get("hash_algorithm", "hash_algorithm")
        problems.append(f"{named}: {why}")
    for key in ("chunk_size", "load_deadline_ms", "save_deadline_ms", "keep_ms"):
        if getattr(options, key) <= 0:
            problems.append(f"{key}={getattr(options, key)} must be positive")
    if options.ranks < 0:
        problems.append(f"ranks={options.ranks} must be positive, or absent")
    if not 0 <= options.idle_wait_ms <= MAX_IDLE_WAIT_MS:
        problems.append(f"idle_wait_ms={options.idle_wait_ms} must be 0 to {MAX_IDLE_WAIT_MS}")
    if not 0 <= options.keep_share <= 1:
        problems.append(f"keep_share={options.keep_share} must be 0 to 1")
    if options.push not in PUSHES:
        problems.append(f"push={options.push!r} must be one of {', '.join(PUSHES)}")
    if options.sidecar not in ("", "spawn"):
        problems.append(f"sidecar={options.sidecar!r} must be 'spawn', or absent")
    if options.sidecar_arguments and not options.sidecar:
        problems.append("sidecar_arguments without sidecar='spawn' have no effect")
    if options.sidecar and options.sender_socket != options.receiver_socket and both:
        problems.append("sidecar='spawn' starts one sidecar: set both sockets to the same path, or leave both out")
    # A program that reads keys splits each key at `@`, so a name with `@` would shift the parts of the key.
    name = options.model_name or model
    if "@" in name or not name:
        problems.append(f"model_name={name!r} must not be empty or contain '@', which separates the parts of a key")
    allowed = options.allow_load_failure_policy_fail
    if consumer and load_failure_policy != "recompute" and not allowed:
        problems.append(
            f"kv_load_failure_policy={load_failure_policy!r} makes vLLM answer HTTP 500 when KV "
            "does not arrive: set it to 'recompute', for MultiConnector and for this child of MultiConnector, "
            "or allow_load_failure_policy_fail to true"
        )
    if problems:
        raise ConfigError(problems)
    # An engine with both roles has either one sidecar with `--role both`, or two sidecars with two named sockets.
    sockets = {}
    for side in ("sender", "receiver"):
        role = "both" if both else side
        default = own_sidecar.socket_of(role, engine_id) if options.sidecar else default_socket(role)
        sockets[f"{side}_socket"] = getattr(options, f"{side}_socket") or default
    return Options(**{**values, "model_name": name, **sockets})


PUSHES = ("auto", "layers", "step")
KEY_SETTINGS = (lmcache.HASH_KEY, lmcache.CHUNK_KEY)
"""The settings of LMCache that the connector itself reads."""
MAX_IDLE_WAIT_MS = 50
"""The maximum of `idle_wait_ms`. The wait is a part of a step, and a new request waits for the end of the step. So
users notice a wait that is longer than this maximum.
"""
