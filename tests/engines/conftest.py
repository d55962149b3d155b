"""The engines of a test session: a prefill and a decode instance with their sidecars and the proxy, and a plain one.

They are started once, all at the same time. Tests that want another transport or buffer restart sidecars only; the
`pair` fixture puts the standard set-up back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine import Engine, EngineOptions, wait_for
from harness.model import write_lora, write_model
from harness.pair import Pair, PairOptions, pair_of
from harness.process import ended_by_signals
from harness.progress import Progress
from harness.reference import Reference
from harness.sidecar import ROOT

# Longer than the default of 50 ms: a busy machine may need it to get a decode request parked, and without that the
# sender cannot know what the decode side holds, and pushes all of it.
KEYS: dict[str, object] = {"park_ms": 3000}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First those that start large engines of their own: the session's, which stay, need the room afterwards."""
    items.sort(key=lambda item: "own_engines" not in item.keywords)


@pytest.fixture(scope="session")
def engines(pytestconfig: pytest.Config, logs: Path) -> Iterator[tuple[Pair, Reference]]:
    """The pair and the plain instance, as started: for fixtures; tests take `pair` and `reference`."""
    model = write_model(ROOT / "target" / "model")
    lora = {"lora": write_lora(ROOT / "target" / "lora")}
    # Without a prefix cache: it computes every answer from the start.
    plain = Engine(
        EngineOptions("plain engine", model, lora=lora, forked=True, more=("--no-enable-prefix-caching",)), logs
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_signals())
        stack.callback(plain.stop)
        with _shown(pytestconfig):
            progress = Progress()
            plain.start()
            pair = stack.enter_context(
                pair_of(PairOptions(model, logs, forked=True, lora=lora, sidecar_keys=KEYS), progress)
            )
            wait_for([plain], progress)
        yield pair, Reference(plain)


@pytest.fixture
def pair(engines: tuple[Pair, Reference]) -> Iterator[Pair]:
    """The pair in its standard set-up, with nothing held or cached; afterwards nothing may be held either."""
    pair, _ = engines
    pair.restore()
    pair.reset_prefix_caches()
    yield pair
    pair.wait_empty()


@pytest.fixture
def reference(engines: tuple[Pair, Reference]) -> Reference:
    return engines[1]


@contextlib.contextmanager
def _shown(config: pytest.Config) -> Iterator[None]:
    """Inside, output goes to the terminal: engines take a minute or two to start, and whoever waits sees why."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext():
        yield
