# SPDX-License-Identifier: Apache-2.0
import time

import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.measure.timing import take_turns, time_calls
from evit_jax.training.clock import Clock


def sleeper(name, seconds, calls):
    """A function that takes so long, writes its name down and returns an array."""

    def function():
        calls.append(name)
        time.sleep(seconds)
        return jnp.zeros(())

    return function


def test_variants_take_turns_forwards_and_backwards_after_two_calls_each():
    calls, turns = [], []
    variants = dict(a=sleeper("a", 0.02, calls), b=sleeper("b", 0.04, calls))
    figures = take_turns(variants, rounds=3, seconds=0.001, after_turn=lambda: turns.append(1))
    assert {name: values.shape for name, values in figures.items()} == dict(a=(3,), b=(3,))
    assert min(figures["a"]) >= 0.02
    assert min(figures["b"]) >= 0.04
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"
    assert len(turns) == 6


def test_a_turn_has_as_many_calls_as_fit():
    calls = []
    figures = take_turns(dict(a=sleeper("a", 0.02, calls)), rounds=1, seconds=0.2)
    assert 4 <= len(calls) - 2 <= 10  # sleeping takes longer than asked for on a busy machine
    assert 0.02 <= figures["a"][0] < 0.1


@pytest.mark.parametrize("queued", [False, True])
def test_every_result_is_awaited_at_once_or_behind_the_last_call(queued, monkeypatch):
    events = []

    def function():
        events.append("call")
        return dict(logits=jnp.zeros(3))

    def awaiting(leaves):
        events.append(f"await {len(leaves)}")

    monkeypatch.setattr("jax.block_until_ready", awaiting)
    time_calls("a", function, 3, queued=queued)
    assert events == (["call"] * 3 + ["await 3"] if queued else ["call", "await 1"] * 3)


def test_what_cannot_be_awaited_is_not_timed():
    donated = jnp.zeros(3)
    donated.delete()
    for result, text in (
        (None, "dense cannot be timed: it has to return JAX arrays, got nothing"),
        ((jnp.zeros(3), np.zeros(3)), "got ndarray"),
        (lambda: None, "got function"),
        (donated, "donated to another program"),
    ):
        with pytest.raises(InputError, match=text):
            take_turns(dict(dense=lambda result=result: result), rounds=1)


def test_the_clock_counts_images_waiting_and_pauses():
    clock = Clock()
    with clock.waiting():
        time.sleep(0.05)
    time.sleep(0.05)
    with clock.paused():
        time.sleep(0.2)
    clock.images += 10
    figures = clock.read()
    # Sleeping takes at least as long as asked for, and on a busy machine longer.
    assert 30 < figures["images_per_second"] <= 100
    assert figures["data_wait"] == pytest.approx(0.5, abs=0.25)
    assert clock.read() == dict(images_per_second=None, data_wait=None)
