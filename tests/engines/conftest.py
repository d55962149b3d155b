"""Starts the engines of a test session: a prefill and a decode instance with their sidecars and the proxy, and a plain
instance.

The engines start once, all at the same time. A test that needs another transport or buffer restarts only the sidecars;
the `pair` fixture restores the standard options.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine import Engine, EngineOptions, wait_for
from harness.model import write_llava, write_lora
from harness.pair import Pair, PairOptions, pair_of
from harness.process import ended_by_signals
from harness.progress import Progress
from harness.reference import Reference
from harness.sidecar import ROOT

# The default of `park_ms` is 50 ms. A busy machine may need longer to park a decode request. Without a parked request
# the sender does not know which KV the decode side holds, and pushes the KV of the whole prompt.
KEYS: dict[str, object] = {"park_ms": 3000}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves the tests that start large engines to the front, because the session's engines take the memory later."""
    items.sort(key=lambda item: "own_engines" not in item.keywords)


@pytest.fixture(scope="session")
def engines(pytestconfig: pytest.Config, logs: Path) -> Iterator[tuple[Pair, Reference]]:
    """Starts the pair and the plain instance. Only for other fixtures; tests use `pair` and `reference`."""
    model = write_llava(ROOT / "target" / "model-llava")
    lora = {"lora": write_lora(ROOT / "target" / "lora-llava")}
    # The plain instance has no prefix cache, so it computes every prompt from the start.
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
    """Yields the pair with its standard options and empty caches. Checks afterwards that no part holds KV."""
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
    """Shows output on the terminal inside the block, because engines take one or two minutes to start."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else contextlib.nullcontext():
        yield
