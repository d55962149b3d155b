"""Several stores as one: each key belongs to one of them."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from pd_sidecar.store.client import Bounds, StoreClient, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Item = TypeVar("Item")


class Stores:
    """The stores of a fleet. A store that is away has no values and takes none; the others go on.

    A key belongs to the store with the highest hash of the store's address and the key (rendezvous hashing). If a store
    is added or removed, only the keys of this store move. The order of the addresses does not matter.
    """

    def __init__(self, urls: Sequence[str], bounds: Bounds) -> None:
        """Each of `urls` is `lm://host:port`. Raises ValueError for another form, for none, and for one named twice."""
        if not urls or len(set(urls)) != len(urls):
            raise ValueError(f"url: {urls!r} must name at least one store, and each store once")
        self._clients = {url: StoreClient(url, bounds) for url in sorted(urls)}
        # The stores answer at the same time, so that one that is slow does not delay the others.
        self._pool = ThreadPoolExecutor(4 * len(urls), "pd_stores") if len(urls) > 1 else None

    def exists(self, keys: Sequence[bytes]) -> list[bool]:
        """Returns for each key whether its store has a value."""
        return self._ask(keys, keys, lambda client, part: client.exists(part))

    def put(self, values: Sequence[tuple[bytes, memoryview]]) -> list[bool]:
        """Puts values. Returns for each value whether its store has received it."""

        def put(client: StoreClient, part: Sequence[tuple[bytes, memoryview]]) -> list[bool]:
            client.put(part)
            return [True] * len(part)

        return self._ask([key for key, _ in values], values, put)

    def get(self, values: Sequence[tuple[bytes, memoryview]]) -> list[bool]:
        """Writes the value of each key into the key's memory. Returns for each key whether it was there."""
        return self._ask([key for key, _ in values], values, lambda client, part: client.get(part))

    def close(self) -> None:
        """Closes the idle connections."""
        for client in self._clients.values():
            client.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _ask(
        self, keys: Sequence[bytes], items: Sequence[Item], call: Callable[[StoreClient, Sequence[Item]], list[bool]]
    ) -> list[bool]:
        """Calls each store with its items. Returns the results in the order of the items."""
        places: dict[str, list[int]] = {}
        for at, key in enumerate(keys):
            places.setdefault(self.of(key), []).append(at)

        def ask(url: str) -> list[bool]:
            part = [items[at] for at in places[url]]
            try:
                return call(self._clients[url], part)
            except StoreError:
                # The client has logged it.
                return [False] * len(part)

        answers = [False] * len(items)
        asked = map(ask, places) if self._pool is None or len(places) < 2 else self._pool.map(ask, places)
        for url, part in zip(places, asked, strict=True):
            for at, answer in zip(places[url], part, strict=True):
                answers[at] = answer
        return answers

    def of(self, key: bytes) -> str:
        """Returns the address of the key's store."""
        if len(self._clients) == 1:
            return next(iter(self._clients))
        return max(self._clients, key=lambda url: hashlib.blake2b(url.encode() + b"\0" + key, digest_size=8).digest())
