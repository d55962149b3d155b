"""Frames and messages of the local socket, as in `protocol/src/local.rs`.

A frame is a little-endian `u32` length and one msgpack map. The map's key `type` names the message. Each side ignores
unknown keys, so that either side may be newer.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, TypeVar, Union
from unicodedata import category

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION = 1
"""The version of the protocol that this package speaks."""

MAX_REASON_CHARACTERS = 500
"""Maximum length of the reason why an engine moves no KV. The sidecar refuses texts of more than 4096 bytes."""

MAX_FRAME_BYTES = 1 << 20
"""Maximum length of a frame. The keys of a request of a million tokens take 600 KB."""

HEADER = struct.Struct("<I")


class WireError(Exception):
    """The other side broke the protocol. The connection can no longer be used."""


class Group(msgspec.Struct, frozen=True, omit_defaults=True):
    """One group of layers in a layout with several groups."""

    kind: str
    """`full`, `window`, `chunked` or `state`."""
    bytes: int
    """The bytes of one token in all layers of the group; for `state` the bytes of one request."""
    size: int = 0
    """The tokens of the window, or of one chunk of chunked attention."""


class Layout(msgspec.Struct, frozen=True, omit_defaults=True):
    """The format of one chunk, as in `protocol/src/layout.rs`.

    A layout with `groups` describes the groups in full by a digest in `quantization`, which releases before groups
    compare. `layers`, `kv_heads`, `head_size`, `dtype` and `mla` then describe the first group only.
    """

    model: str
    dtype: str
    layers: int
    kv_heads: int
    head_size: int
    mla: bool
    chunk_tokens: int
    quantization: str = ""
    groups: list[Group] = []

    @property
    def chunk_bytes(self) -> int:
        """The bytes of a full chunk, which is the size of a slot. Raises `KeyError` for an unknown dtype."""
        if self.groups:
            return slot_bytes(self.groups, self.chunk_tokens)
        planes = 1 if self.mla else 2
        width = self.kv_heads * self.head_size * ELEMENT_BYTES[self.dtype]
        return planes * self.layers * self.chunk_tokens * width


def slot_bytes(groups: Sequence[Group], chunk_tokens: int) -> int:
    """Returns the size of a slot: the tokens of a full chunk in all groups, or the whole state if there are no
    tokens in any group.
    """
    tokens = sum(group.bytes for group in groups if group.kind != "state") * chunk_tokens
    return tokens or sum(group.bytes for group in groups)


ELEMENT_BYTES = {
    **dict.fromkeys(("double", "int64"), 8),
    **dict.fromkeys(("float", "int32"), 4),
    **dict.fromkeys(("half", "bfloat16", "int16"), 2),
    **dict.fromkeys(("int8", "uint8", "bool", "fp8_e4m3fn", "fp8_e4m3fnuz"), 1),
    **dict.fromkeys(("fp8_e5m2", "fp8_e5m2fnuz"), 1),
}


class Target(msgspec.Struct, frozen=True):
    """The init and alloc addresses of one receiver rank."""

    host: str
    init_port: int
    alloc_port: int


class _Message(msgspec.Struct, tag_field="type", tag=True):
    pass


class Hello(_Message, omit_defaults=True):
    """Opens the connection."""

    v: int
    engine: str
    role: str  # "prefill" or "decode"
    rank: int
    world_size: int
    layout: Layout
    device: str | None = None  # The UUID of this engine's GPU.
    events: list[bytes] = []  # The CUDA IPC handles of events on this GPU.
    unmoved: str = ""  # The reason why this engine moves no KV. `layout` then contains only the model.

    @classmethod
    def of_unmoved(cls, engine: str, role: str, rank: int, world_size: int, model: str, why: str) -> Hello:
        """Returns the greeting of an engine that moves no KV, with the reason."""
        layout = Layout(model, "", 0, 0, 0, mla=False, chunk_tokens=0)
        return cls(VERSION, engine, role, rank, world_size, layout, unmoved=_line(why))

    def as_unmoved(self, why: str) -> Hello:
        """Returns the greeting that this engine sends while it moves no KV, with the reason."""
        model = self.layout.model
        return self.of_unmoved(self.engine, self.role, self.rank, self.world_size, model, why)


class Reserve(_Message):
    """Prefill: the engine starts to compute the request, and asks the sidecar to get slots for these chunks from the
    receiver `to`.
    """

    req: str
    to: Target
    keys: list[str]
    tokens: int
    upto: int
    overlap: bool = False


class Keep(_Message):
    """Prefill: the engine keeps the KV of a request that names no receiver, until a decode side fetches it."""

    req: str
    token: str
    keys: list[str]
    tokens: int
    upto: int
    keep_ms: int


class Computing(_Message):
    """Prefill: when this step ends, tokens `[0, upto)` are computed."""

    req: str
    upto: int


class LayersStaged(msgspec.Struct, frozen=True):
    """The layers from the previous range's end to layer `below` (exclusive) are complete when `event` has fired."""

    below: int
    event: int


class Staged(_Message, omit_defaults=True):
    """Prefill: the engine has gathered these chunks into their granted slots. If there is an `event`, the chunks are
    complete when the event has fired.
    """

    req: str
    chunks: list[int]
    gather_us: int = 0
    event: int | None = None
    layers: list[LayersStaged] = []
    """The same chunks by ranges of layers. The last range ends with the last layer."""


class Cancel(_Message):
    """Prefill: the engine ends the request, and no longer touches the request's slots."""

    req: str


class Keeper(msgspec.Struct, frozen=True):
    """The address of the fetch port of one rank of a prefill side."""

    host: str
    port: int


class Expect(_Message, rename={"from_": "from"}):
    """Decode: the KV of a request waits at a prefill side. The sidecar makes the prefill side keep the KV until the
    request's `Await`.
    """

    req: str
    token: str
    from_: Keeper
    epoch: int
    keep_ms: int


class Await(_Message):
    """Decode: the request is parked with its KV blocks allocated, and waits for these chunks."""

    req: str
    keys: list[str]
    tokens: int
    have_tokens: int
    deadline_ms: int
    written: bool = False


class Release(_Message):
    """Decode: the engine has read these chunks."""

    req: str
    chunks: list[int]
    scatter_us: int = 0


class Abort(_Message):
    """Decode: the engine no longer wants the request, and reads none of its slots after this message."""

    req: str


class Drain(_Message):
    """Instead of `Hello`: the sidecar takes no new KV of prefill engines, and answers `Drained`. An operator's command
    sends this message, not an engine.
    """

    until_fetched: bool


class CudaMemory(msgspec.Struct, frozen=True):
    """A buffer in GPU memory, with the handle by which another process opens it."""

    uuid: str
    handle: bytes
    size: int = msgspec.field(name="bytes")


class Welcome(_Message, omit_defaults=True):
    """The sidecar accepts the connection. The message carries the buffer. Host memory comes as a descriptor that
    accompanies the frame; GPU memory comes as the handle in `cuda`.
    """

    v: int
    id: str
    epoch: int
    memory: str
    slots: int
    slot_bytes: int
    connection: int
    cuda: CudaMemory | None = None
    fetch: Keeper | None = None  # where decode sides fetch KV that this engine keeps


class Refused(_Message):
    """The sidecar refuses the connection and closes it."""

    reason: str
    text: str


class Granted(_Message, omit_defaults=True):
    """Prefill: the engine may gather these chunks into these slots, and then sends `Staged`."""

    req: str
    have_tokens: int
    chunks: list[int]
    slots: list[int]
    layers: bool = False


class Ready(_Message):
    """Decode: the engine may read these chunks. The chunk that contains token `first_token` begins with this token."""

    req: str
    first_token: int
    chunks: list[int]
    slots: list[int]


class Ended(_Message):
    """The sidecar's last message about a request. `reason` is absent if every wanted chunk arrived."""

    req: str
    reason: str | None = None
    bytes: int = 0


class Drained(_Message):
    """The answer to `Drain`, with the number of requests with KV that decode sides may still fetch."""

    kept: int


def _line(text: str) -> str:
    """Returns the text in the form that a message allows: without control characters, and of bounded length."""
    printable = "".join(" " if category(c) in ("Cc", "Cs") else c for c in text)
    return printable[:MAX_REASON_CHARACTERS] or "no reason given"


ToSidecar = Union[Hello, Reserve, Keep, Computing, Staged, Cancel, Expect, Await, Release, Abort, Drain]  # noqa: UP007
ToEngine = Union[Welcome, Refused, Granted, Ready, Ended, Drained]  # noqa: UP007

_ENCODER = msgspec.msgpack.Encoder()
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_TO_SIDECAR: msgspec.msgpack.Decoder[ToSidecar] = msgspec.msgpack.Decoder(ToSidecar)
_T = TypeVar("_T")


def encode(message: ToSidecar | ToEngine) -> bytes:
    """Encodes a message as a frame.

    Raises `WireError` if the frame would be longer than the other side accepts.
    """
    body = _ENCODER.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"{type(message).__name__} of {len(body)} bytes exceeds a frame of {MAX_FRAME_BYTES} bytes")
    return HEADER.pack(len(body)) + body


def decode_to_engine(body: bytes | bytearray | memoryview) -> ToEngine:
    """Decodes a message of a sidecar."""
    return _decode(_TO_ENGINE, body)


def decode_to_sidecar(body: bytes | bytearray | memoryview) -> ToSidecar:
    """Decodes a message of an engine, for tests that play the sidecar."""
    return _decode(_TO_SIDECAR, body)


def _decode(decoder: msgspec.msgpack.Decoder[_T], body: bytes | bytearray | memoryview) -> _T:
    try:
        return decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise WireError(f"cannot decode a message: {error}") from error


class FrameBuffer:
    """Cuts a byte stream into frames."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        """Adds bytes that were read from the stream."""
        self._bytes += data

    def first(self) -> tuple[bytes | None, bytes]:
        """Returns the first frame, if it is complete, and the bytes after it.

        Raises `WireError` as soon as a header announces a frame that is too long.
        """
        if len(self._bytes) < HEADER.size:
            return None, b""
        (length,) = HEADER.unpack_from(self._bytes)
        if length > MAX_FRAME_BYTES:
            raise WireError(f"a header announces a frame of {length} bytes, more than {MAX_FRAME_BYTES}")
        end = HEADER.size + length
        if len(self._bytes) < end:
            return None, b""
        return bytes(self._bytes[HEADER.size : end]), bytes(self._bytes[end:])

    def frames(self) -> list[bytes]:
        """Removes and returns the frames that are complete. Raises as `first` does."""
        out: list[bytes] = []
        while True:
            body, rest = self.first()
            if body is None:
                return out
            out.append(body)
            self._bytes = bytearray(rest)
