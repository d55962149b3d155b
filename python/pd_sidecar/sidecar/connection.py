"""One connection to a sidecar: the socket, the greeting and the mapped buffer."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
import time
from typing import TYPE_CHECKING

from pd_sidecar.sidecar.socket_owner import check_folder, check_peer
from pd_sidecar.sidecar.wire import (
    VERSION,
    FrameBuffer,
    Granted,
    Hello,
    Ready,
    Refused,
    ToEngine,
    ToSidecar,
    Welcome,
    WireError,
    decode_to_engine,
    encode,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

READ_BYTES = 256 << 10
MAX_UNSENT_BYTES = 64 << 20
"""Maximum number of unsent bytes. A sidecar that leaves more bytes unread is stuck; a larger limit would only hide
this.
"""


class ConnectionLostError(Exception):
    """The stream has ended, or can no longer be used."""


class RefusedError(Exception):
    """The sidecar refuses this engine. `reason` is for programs, and the text is for people."""

    def __init__(self, refused: Refused) -> None:
        super().__init__(f"{refused.text} ({refused.reason})")
        self.reason = refused.reason


class Connection:
    """A connection after the greeting. Not thread-safe: other threads may use only `fileno` and `shut`.

    The socket is closed and the buffer is unmapped when the last reference is dropped. So views of the buffer stay
    valid as long as an engine holds them, even if the sidecar dies.
    """

    def __init__(self, sock: socket.socket, welcome: Welcome, memory: mmap.mmap | None) -> None:
        self.welcome = welcome
        self.memory = memory
        self._socket = sock
        self._incoming = FrameBuffer()
        self._unsent = bytearray()

    @classmethod
    def open(cls, path: str, hello: Hello, timeout_s: float) -> Connection:
        """Connects, sends the greeting and maps the buffer.

        Raises `OSError` if no sidecar listens or answers in time, `PermissionError` if the socket belongs to another
        user, `RefusedError` if the sidecar refuses this engine, and `WireError` if the sidecar does not speak this
        protocol.
        """
        deadline = time.monotonic() + timeout_s
        check_folder(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(timeout_s)
            sock.connect(path)
            check_peer(sock, path)
            sock.sendall(encode(hello))
            body, rest, fds = _first_frame(sock, deadline)
            try:
                welcome = _greeting(body)
                memory = _map(welcome, hello, fds)
            finally:
                _close(fds)
            sock.setblocking(False)
            connection = cls(sock, welcome, memory)
            connection._incoming.feed(rest)
        except BaseException:
            sock.close()
            raise
        return connection

    def __del__(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """Returns the descriptor, for `select`."""
        return self._socket.fileno()

    def slot(self, index: int) -> memoryview:
        """Returns the bytes of a slot, to read or write in place."""
        if not 0 <= index < self.welcome.slots:
            raise IndexError(f"slot {index} does not exist: the buffer has {self.welcome.slots} slots")
        if self.memory is None:
            raise ValueError("the slots are in GPU memory")
        start = index * self.welcome.slot_bytes
        return memoryview(self.memory)[start : start + self.welcome.slot_bytes]

    def send(self, message: ToSidecar) -> None:
        """Sends a message. If the kernel does not accept all bytes now, the next `send` or `poll` sends the rest.

        Raises `ConnectionLostError`.
        """
        self._unsent += encode(message)
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise ConnectionLostError(f"the sidecar does not read its socket: {len(self._unsent)} bytes are unsent")
        self._flush()

    def poll(self) -> list[ToEngine]:
        """Returns the messages that have arrived, without waiting.

        Raises `ConnectionLostError` or `WireError`.
        """
        self._flush()
        while True:
            try:
                data = self._socket.recv(READ_BYTES)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:
                raise ConnectionLostError(str(error)) from error
            if not data:
                # Drop the messages that came before the end: their slots no longer exist.
                raise ConnectionLostError("the sidecar closed the connection")
            self._incoming.feed(data)
            if len(data) < READ_BYTES:
                break
        return [self._checked(decode_to_engine(body)) for body in self._incoming.frames()]

    def shut(self) -> None:
        """Ends the stream in both directions. The descriptor stays open until the last reference is dropped."""
        with contextlib.suppress(OSError):  # the other side has already ended the stream
            self._socket.shutdown(socket.SHUT_RDWR)

    def _checked(self, message: ToEngine) -> ToEngine:
        """Checks the slots of a message: a wrong number would become an address outside the buffer."""
        if isinstance(message, Granted | Ready):
            if len(message.chunks) != len(message.slots):
                raise WireError(f"the message has {len(message.chunks)} chunks, but {len(message.slots)} slots")
            if any(not 0 <= slot < self.welcome.slots for slot in message.slots):
                raise WireError(f"slots {message.slots}, but the buffer has only {self.welcome.slots} slots")
        return message

    def _flush(self) -> None:
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise ConnectionLostError(str(error)) from error
            del self._unsent[:sent]


def wait_readable(connections: Iterable[Connection], timeout_s: float) -> None:
    """Returns when one of the connections has something to read, or after the timeout."""
    poller = select.poll()
    for connection in connections:
        poller.register(connection.fileno(), select.POLLIN)
    poller.poll(timeout_s * 1000)


def _first_frame(sock: socket.socket, deadline: float) -> tuple[bytes, bytes, list[int]]:
    """Returns the first frame, the bytes after the frame, and the descriptors that came with the frame."""
    frames = FrameBuffer()
    fds: list[int] = []
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the sidecar did not answer the greeting")
            sock.settimeout(left)
            # Without MSG_CMSG_CLOEXEC, a worker that forks would pass the buffer to its child.
            data, received, flags, _ = socket.recv_fds(sock, READ_BYTES, 4, getattr(socket, "MSG_CMSG_CLOEXEC", 0))
            fds.extend(received)
            if flags & socket.MSG_CTRUNC:
                raise WireError("too many descriptors came with the greeting")
            if not data:
                raise ConnectionResetError("the sidecar closed the connection during the greeting")
            frames.feed(data)
            complete, rest = frames.first()
            if complete is not None:
                return complete, rest, fds
    except BaseException:
        _close(fds)
        raise


def _greeting(body: bytes) -> Welcome:
    message = decode_to_engine(body)
    if isinstance(message, Refused):
        raise RefusedError(message)
    if not isinstance(message, Welcome):
        raise WireError(f"the sidecar answered the greeting with {type(message).__name__}")
    if message.v != VERSION:
        raise WireError(f"the sidecar speaks version {message.v}, this package version {VERSION}: update one of them")
    return message


def _map(welcome: Welcome, hello: Hello, fds: list[int]) -> mmap.mmap | None:
    """Maps a buffer in host memory. A buffer in GPU memory is opened later, by the engine's own thread: if the
    reconnecting thread opened it while the engine captures a graph, the capture would fail.
    """
    if hello.unmoved:
        if welcome.memory != "none" or welcome.slots or fds:
            raise WireError(f"the sidecar gave a buffer of kind {welcome.memory!r} to an engine that moves no KV")
        return None
    kind = "memfd" if hello.device is None else "cuda"
    if welcome.memory != kind or (welcome.cuda is None) != (kind == "memfd"):
        raise WireError(
            f"the sidecar's buffer is of kind {welcome.memory!r}, this engine needs {kind!r}: set "
            f"pd_buffer_device of its configuration to {'cpu' if kind == 'memfd' else 'cuda'}"
        )
    if len(fds) != (kind == "memfd"):
        raise WireError(f"{len(fds)} descriptors came with the greeting, instead of {int(kind == 'memfd')}")
    if welcome.slot_bytes != hello.layout.chunk_bytes:
        raise WireError(f"slots of {welcome.slot_bytes} bytes do not fit chunks of {hello.layout.chunk_bytes} bytes")
    size = welcome.slots * welcome.slot_bytes
    if welcome.cuda is not None:
        if not 0 < size <= welcome.cuda.size:
            raise WireError(f"the buffer of {welcome.cuda.size} bytes is smaller than {welcome.slots} slots")
        return None
    if size == 0 or os.fstat(fds[0]).st_size < size:
        raise WireError(f"the buffer is smaller than {welcome.slots} slots")
    if not fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise WireError("the buffer is not sealed: if it shrank, reading it would end the engine")
    # Populate the pages here, in the thread that connects, so that the first gather does not wait for page faults.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return mmap.mmap(fds[0], size, flags=flags)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
