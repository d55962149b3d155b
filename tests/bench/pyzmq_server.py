"""Answers alloc requests with pyzmq and msgspec: the server of the handshake benchmark's baseline. Run as a script."""

from __future__ import annotations

import msgspec
import zmq


class AllocRequest(msgspec.Struct, tag=True):
    """The alloc request, declared as a Python implementation of this protocol would declare it."""

    keys: list[str]
    fmt: int
    shape: list[int]
    dtype: str
    last_chunk_toks: int
    req_id: str
    is_last_batch: bool
    total_chunks: int


class AllocResponse(msgspec.Struct, tag=True):
    remote_indexes: list[int]
    already_sent_indexes: list[int]


def serve() -> None:
    """Answers every request with a slot for each key, until it is killed."""
    peer = zmq.Context().socket(zmq.REP)
    print(peer.bind_to_random_port("tcp://127.0.0.1"), flush=True)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(AllocRequest)
    while True:
        request = decoder.decode(peer.recv())
        peer.send(encoder.encode(AllocResponse(list(range(len(request.keys))), [])))


if __name__ == "__main__":
    serve()
