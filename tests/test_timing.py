# SPDX-License-Identifier: Apache-2.0
import time

import jax.numpy as jnp
import pytest

from evit_jax.timing import Clock, take_turns


def test_variants_take_turns_after_one_call_each():
    calls = []

    def variant(name, seconds):
        def function():
            calls.append(name)
            time.sleep(seconds)
            return jnp.zeros(())

        return function

    figures = take_turns(dict(a=variant("a", 0.02), b=variant("b", 0.04)), rounds=3, seconds=0.04)
    assert {name: values.shape for name, values in figures.items()} == dict(a=(3,), b=(3,))
    assert min(figures["a"]) >= 0.02
    assert min(figures["b"]) >= 0.04
    in_turn = "".join(calls[4:]).replace("aa", "a")  # a fits twice into its share of a round
    assert in_turn == "ababab"


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
