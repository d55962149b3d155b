"""Tests the decision whether a request loads from a store."""

from __future__ import annotations

from pd_sidecar.store.worth import Worth


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def measured(worth: Worth, clock: Clock, load_s: float, compute_s: float, times: int = 16) -> None:
    for at in range(times):
        worth.loaded(10, 10 * load_s)
        worth.begins(f"m{at}")
        clock.now += 4 * compute_s
        worth.computed(f"m{at}", 4)
        worth.ended(f"m{at}")


def test_loading_is_tried_until_both_times_are_known():
    worth = Worth(clock=Clock())
    assert worth.loads("a")
    worth.loaded(1, 5.0)
    assert worth.loads("b")
    assert worth.load_s == 5.0 and worth.compute_s is None


def test_the_cheaper_way_is_taken_as_measured():
    clock = Clock()
    worth = Worth(clock=clock)
    measured(worth, clock, load_s=0.01, compute_s=0.02)
    assert worth.loads("a")
    # The store slows down: the newest measurements decide.
    measured(worth, clock, load_s=0.03, compute_s=0.02)
    worth.loads("try")
    assert not worth.loads("b")
    # The engine slows down.
    measured(worth, clock, load_s=0.03, compute_s=0.04)
    assert worth.loads("c")


def test_the_answer_for_a_request_stays():
    clock = Clock()
    worth = Worth(clock=clock)
    assert worth.loads("a")
    measured(worth, clock, load_s=2.0, compute_s=0.001)
    assert worth.loads("a")
    assert not worth.loads("b")
    worth.ended("a")
    assert not worth.loads("a")


def test_a_slow_store_is_tried_again_with_one_request():
    clock = Clock()
    worth = Worth(retry_s=10.0, clock=clock)
    worth.loads("first")
    measured(worth, clock, load_s=2.0, compute_s=0.001)
    assert not worth.loads("a")
    clock.now += 10.0
    assert worth.loads("b")
    assert not worth.loads("c")


def test_only_the_first_chunks_of_a_request_count():
    clock = Clock()
    worth = Worth(clock=clock)
    worth.begins("a")
    clock.now += 1.0
    worth.computed("a", 10)
    clock.now += 60.0
    worth.computed("a", 1)
    assert worth.compute_s == 0.1
