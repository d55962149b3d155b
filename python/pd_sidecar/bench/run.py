"""Runs a load against one or more servers, one after the other."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pd_sidecar.bench.client import Dialogue, Server, Settings
from pd_sidecar.bench.samples import Result, Sample, quantile
from pd_sidecar.bench.transfers import added, are_reported, counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import aiohttp

    from pd_sidecar.bench.arrivals import Arrivals
    from pd_sidecar.bench.workload import Conversation

PROGRESS_S = 1.0
ERROR_PAUSE_S = 0.2
"""Pause of a client after an error: a server that refuses connections would otherwise get thousands each second."""

NOTICES_S = 5.0
"""Longest time that the proxy's counters may take to show the last transfers."""


@dataclass(frozen=True)
class Plan:
    """A load."""

    conversations: Callable[[int], Iterator[Conversation]]
    """Returns the conversations of a seed."""

    number: int | None
    """Conversations for each round; `None`: only `duration_s` ends a round."""

    duration_s: float | None = None
    """Time after which a round begins no more conversations; `None`: only `number` ends a round."""

    arrivals: Arrivals | None = None
    """An open loop; `None`: a closed loop of `clients`."""

    clients: int = 1
    warmup: int = 0
    """Conversations before the first round that do not count. They open connections and load code."""

    rounds: int = 1
    think_s: float = 0.0
    """Pause of a user before each later turn."""

    seed: int = 0


class Load:
    """A run of all rounds at all servers. `stop` ends the run early."""

    def __init__(self, plan: Plan, servers: list[Server], nonce: str, say: Callable[[str], None]) -> None:
        self.results = [Result(server.name, server.url) for server in servers]
        self.interrupted = False
        self._plan = plan
        self.servers = servers
        # Part of all prompts, so that no prompt is in a server's cache since an earlier run.
        self._nonce = nonce
        self._say = say
        self._running: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Ends the run. Requests under way are cancelled and counted as unfinished."""
        self.interrupted = True
        if self._running is not None:
            self._running.cancel()

    async def run(self, settings: dict[str, Settings]) -> None:
        """Runs all rounds. `settings` has the form of the requests by the server's name. Returns early after `stop`."""
        if self.interrupted:
            return
        self._running = asyncio.ensure_future(self._rounds(settings))
        try:
            await self._running
        except asyncio.CancelledError:
            if not self.interrupted:
                raise

    async def _rounds(self, settings: dict[str, Settings]) -> None:
        for number in range(self._plan.rounds):
            for server, result in zip(self.servers, self.results, strict=True):
                # Servers get equal lengths and arrivals in each round, but different tokens: two names may lead to the
                # same engines, whose prefix cache would answer the second server.
                seed = f"{self._nonce}/{server.name}/{number}"
                async with server.session() as session:
                    if number == 0:
                        await self._warm_up(session, server, settings[server.name], seed)
                    before = counters(await server.metrics(session))
                    round_ = Round(self._plan, session, server, settings[server.name], seed, number)
                    progress = asyncio.ensure_future(self._progress(result, round_))
                    try:
                        await round_.run()
                    finally:
                        progress.cancel()
                        result.samples += round_.samples
                        result.unfinished += round_.unfinished
                        result.seconds += max((s.start_s + s.total_s for s in round_.samples), default=0.0)
                    await self._count_transfers(session, server, result, before)

    async def _warm_up(self, session: aiohttp.ClientSession, server: Server, settings: Settings, seed: str) -> None:
        unused: list[Sample] = []
        conversations = self._plan.conversations(self._plan.seed)
        for number, conversation in enumerate(itertools.islice(conversations, self._plan.warmup)):
            dialogue = Dialogue(conversation, settings, f"{seed}/warm-up-{number}")
            await dialogue.run(session, server, unused, 0.0)

    async def _count_transfers(
        self, session: aiohttp.ClientSession, server: Server, result: Result, before: dict[str, float]
    ) -> None:
        """Adds the changes of the proxy's counters. Waits a moment for the senders' last reports."""
        deadline = time.perf_counter() + NOTICES_S
        after = counters(await server.metrics(session))
        while not are_reported(before, after) and time.perf_counter() < deadline:
            await asyncio.sleep(0.1)
            after = counters(await server.metrics(session))
        for name, change in added(before, after).items():
            result.transfers[name] = result.transfers.get(name, 0.0) + change

    async def _progress(self, result: Result, round_: Round) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            done = round_.samples
            failed = sum(bool(sample.error) for sample in done)
            firsts = sorted(sample.first_s for sample in done if sample.first_s is not None)
            first = f", first token p50 {quantile(firsts, 0.5) * 1000:.0f} ms" if firsts else ""
            self._say(
                f"{result.name}: {time.perf_counter() - round_.began:.0f} s, {len(done)} requests ended, "
                f"{round_.under_way} conversations under way, {failed} failed{first}"
            )


class Round:
    """One round at one server."""

    def __init__(
        self, plan: Plan, session: aiohttp.ClientSession, server: Server, settings: Settings, seed: str, number: int
    ) -> None:
        self.samples: list[Sample] = []
        self.under_way = 0
        # Conversations that were cancelled.
        self.unfinished = 0
        self.began = time.perf_counter()
        self._plan = plan
        self._session = session
        self._server = server
        self._settings = settings
        self._seed = seed
        self._number = plan.seed + number
        conversations = plan.conversations(self._number)
        self._conversations = conversations if plan.number is None else itertools.islice(conversations, plan.number)

    async def run(self) -> None:
        """Returns when all conversations have ended. If it is cancelled, it cancels them."""
        async with asyncio.TaskGroup() as tasks:
            if self._plan.arrivals is None:
                for _ in range(self._plan.clients):
                    tasks.create_task(self._client())
                return
            for at, conversation in self._plan.arrivals.times(self._conversations, self._number):
                if self._is_over(at):
                    return
                await asyncio.sleep(self.began + at - time.perf_counter())
                tasks.create_task(self._converse(conversation, time.perf_counter() - self.began - at))

    async def _client(self) -> None:
        """Sends one conversation after the other."""
        for conversation in self._conversations:
            if self._is_over(time.perf_counter() - self.began):
                return
            if not await self._converse(conversation, 0.0):
                await asyncio.sleep(ERROR_PAUSE_S)

    async def _converse(self, conversation: Conversation, late_s: float) -> bool:
        """Sends a conversation. Returns false if a request failed."""
        dialogue = Dialogue(conversation, self._settings, self._seed)
        self.under_way += 1
        try:
            return await dialogue.run(
                self._session, self._server, self.samples, self.began, late_s=late_s, think_s=self._plan.think_s
            )
        except asyncio.CancelledError:
            self.unfinished += 1
            raise
        finally:
            self.under_way -= 1

    def _is_over(self, at_s: float) -> bool:
        return self._plan.duration_s is not None and at_s >= self._plan.duration_s
