"""Decides which requests are pushed or loaded, and gives the reason for the other requests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from unicodedata import category

from vllm.logger import init_logger

from pd_sidecar.scheduler.kept import KeptSource, source_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.request import Request


logger = init_logger("vllm.pd_sidecar.scheduler.eligibility")


class Skip(StrEnum):
    """The reason why a request is computed as if there were no connector. The counter of these requests has the
    reason as a label.
    """

    NO_PARAMS = "no_params"
    BAD_PARAMS = "bad_params"
    WRONG_ROLE = "wrong_role"
    TP_MISMATCH = "tp_mismatch"
    KV_GROUPS = "kv_groups"
    LAYOUT = "layout"
    LORA = "lora"
    LORA_PENDING = "lora_pending"
    MULTIMODAL = "multimodal"
    CACHE_SALT = "cache_salt"
    PROMPT_EMBEDS = "prompt_embeds"
    PROMPT_LOGPROBS = "prompt_logprobs"
    POOLING = "pooling"
    STREAMING_INPUT = "streaming_input"
    DUPLICATE = "duplicate"
    NOTHING_TO_LOAD = "nothing_to_load"
    NO_FETCH_PORT = "no_fetch_port"
    KEEP_FULL = "keep_full"
    NOT_KEPT = "not_kept"
    NOT_OURS = "not_ours"


@dataclass(frozen=True)
class Transfer:
    """The proxy's instruction for a request."""

    req: str
    host: str = ""
    init_ports: tuple[int, ...] = ()
    alloc_ports: tuple[int, ...] = ()
    overlap: bool = False
    written: bool = False
    """Load: true if an LMCache sender has told the proxy that the whole prompt is written."""
    tokens: int = 0
    """Load: the number of prompt tokens that are pushed; 0 for all. The proxy may have appended the first token, which
    the prefill side sampled. The KV of the appended token does not exist yet.
    """
    wants_first_token: bool = False
    """Push: true if the response must name the first token, as LMCache's proxy expects."""
    keeps: bool = False
    """Push: true if the router names no receiver, so that the engine keeps the KV until a decode side fetches it."""
    kept: KeptSource | None = None
    """Load: the place where a prefill engine keeps the KV; `None` if a sender pushes the KV by itself."""

    @property
    def is_push(self) -> bool:
        """True if this engine pushes the KV to another engine; false if this engine loads the KV."""
        return self.keeps or bool(self.host)

    @property
    def claim(self) -> str:
        """The name that all engine requests of one client request share."""
        return self.kept.token if self.kept is not None else self.req


def unserved(request: Request) -> Skip | None:
    """Returns the reason why this request cannot use KV of another engine; `None` if it can. The reason is either that
    equal tokens may mean different KV, or that this engine must compute the prompt itself.
    """
    if any(PER_REQUEST.match(feature.identifier) for feature in request.mm_features):
        logger.warning_once(
            "images, audio and video are not moved, because this engine does not identify them by their content: set "
            "--mm-processor-cache-gb above 0, or enable prefix caching"
        )
        return Skip.MULTIMODAL
    if request.prompt_token_ids is None or request.prompt_embeds is not None:
        return Skip.PROMPT_EMBEDS
    if request.pooling_params is not None or request.sampling_params is None:
        return Skip.POOLING
    if request.sampling_params.prompt_logprobs is not None or getattr(request, "skip_reading_prefix_cache", False):
        return Skip.PROMPT_LOGPROBS
    if getattr(request, "resumable", False):
        return Skip.STREAMING_INPUT
    return None


def family(engine_id: str) -> str:
    """Returns the part of an engine request's id that all engine requests of one client request share. vLLM puts a
    number before the ids of the sequences of n > 1, and after the ids of the prompts of a list. Then vLLM appends eight
    random digits to each id.
    """
    return FAMILY.sub(r"\1", engine_id)


def transfer(params: Mapping[str, Any] | None, engine_id: str = "") -> Transfer | Skip:
    """Reads the `kv_transfer_params` of the engine request `engine_id`. These parameters come from the
    network, so every field is checked.
    """
    if not isinstance(params, dict):
        return Skip.NO_PARAMS
    push, load = params.get("do_remote_decode"), params.get("do_remote_prefill")
    spec = params.get("disagg_spec")
    if not push and not load:
        # LMCache's proxy names only the receiver.
        push = isinstance(spec, dict) and "receiver_host" in spec
    if not push and not load:
        # Our prefill side has answered that it keeps no KV, but the router sent the decode leg nevertheless.
        return Skip.NOT_KEPT if "pd" in params else Skip.NO_PARAMS
    if spec is None and not (push and load):
        return _unnamed(params, keeps=bool(push))
    if (push and load) or not isinstance(spec, dict):
        return Skip.BAD_PARAMS
    req = spec.get("req_id")
    if not isinstance(req, str):
        return Skip.BAD_PARAMS
    req += _prompt_suffix(engine_id)
    if not _is_name(req, MAX_ID_CHARACTERS):
        return Skip.BAD_PARAMS
    if load:
        written, tokens = spec.get("written", False), spec.get("tokens", 0)
        if not isinstance(written, bool) or type(tokens) is not int or tokens < 0:
            return Skip.BAD_PARAMS
        return Transfer(req, written=written, tokens=tokens)
    host, overlap = spec.get("receiver_host"), spec.get("overlap", False)
    init_ports, alloc_ports = (
        _ports(spec, "receiver_init_port"),
        _ports(spec, "receiver_alloc_port"),
    )
    if not isinstance(host, str) or not _is_name(host, MAX_HOST_CHARACTERS):
        return Skip.BAD_PARAMS
    if not init_ports or not alloc_ports:
        return Skip.BAD_PARAMS
    if len(init_ports) != len(alloc_ports) or not isinstance(overlap, bool):
        return Skip.BAD_PARAMS
    wants_first_token = bool(params.get("ret_first_tok"))
    return Transfer(req, host, init_ports, alloc_ports, overlap, wants_first_token=wants_first_token)


def _unnamed(params: Mapping[str, Any], *, keeps: bool) -> Transfer | Skip:
    """Reads the parameters of routers that name no receiver. The caller sets `req` to the engine's id."""
    if keeps:
        return Transfer("", keeps=True)
    if "pd" not in params and params.get("remote_engine_id"):
        # NixlConnector of vLLM has computed the prompt, or the router sends both legs at the same time.
        return Skip.NOT_OURS
    source = source_of(params)
    return Skip.BAD_PARAMS if source is None else Transfer("", kept=source)


def _prompt_suffix(engine_id: str) -> str:
    """Returns the end of the `req` of one prompt of a list: `/` and the number of the prompt. Returns an empty text for
    the first prompt, and so for requests without a list.

    vLLM makes one engine request for each prompt of a list, and all of them have the same `kv_transfer_params`. Both
    engines number the prompts in the same way. No `req` of a client request contains `/`.
    """
    prompt = PROMPT.match(engine_id)
    return f"/{prompt[1]}" if prompt is not None and int(prompt[1]) > 0 else ""


def _is_name(text: str, most: int) -> bool:
    """Returns true if the sidecar accepts the text in a message. If the sidecar does not accept a text, it ends the
    engine's connection, and with it the transfers of all other requests.
    """
    # Cc is the category that the sidecar calls control characters; text of category Cs cannot be encoded.
    return 0 < len(text) <= most and not any(category(c) in ("Cc", "Cs") for c in text)


def _ports(spec: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = spec.get(key)
    ports = value if isinstance(value, list) else [value]
    if all(type(port) is int and 0 < port < 65536 for port in ports):
        return tuple(ports)
    return ()


FAMILY = re.compile(r"^(?:\d+_)?(.*?)(?:-\d+)?(?:-[0-9a-f]{8})?$")
PROMPT = re.compile(r"(?:\d+_)?cmpl-.*?-(\d{1,6})(?:-[0-9a-f]{8})?$")
"""The id of an engine request of the completions endpoint. vLLM puts the number of the sequence before the id (`n` >
1), and appends the number of the prompt and then eight random digits. Ids of other endpoints have no number of a
prompt.
"""
PER_REQUEST = re.compile(r"(.*:)?renderer\d+-mm-\d+-|(.*:)?[^:]*-[0-9a-f]{8}-[a-z_]+-\d+$")
"""The identifiers of images, audio and video that vLLM numbers by request, because neither its prefix cache nor its
cache of processed inputs is on. Two engines can give the same number to different images. In older versions of vLLM the
identifier begins with the request's id. An adapter's name can come first.
"""
MAX_ID_CHARACTERS = 256
"""Maximum length of a request id, in characters. Ids are in every message and log line."""
MAX_HOST_CHARACTERS = 253
"""Maximum length of a name in the DNS, in characters."""
