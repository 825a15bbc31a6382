# SPDX-License-Identifier: Apache-2.0
import threading

import pytest

from evit_jax.runtime.background import Prefetch, Programs


def test_programs_are_compiled_in_the_background_and_once():
    began, go_on = threading.Event(), threading.Event()
    made = []

    def compile(key):
        began.set()
        assert go_on.wait(10)
        made.append(key)
        return key.upper

    programs = Programs(compile)
    programs.start("a")
    assert began.wait(10)  # and this thread was not held up
    go_on.set()
    assert programs["a"]() == "A"
    assert "compiled in" in programs.wait("a")
    assert programs["b"]() == "B"
    assert made == ["a", "b"]


def test_the_next_item_is_fetched_while_this_one_is_used():
    go_on, closed = threading.Event(), []

    def items():
        try:
            yield from range(2)
            assert go_on.wait(10)
            yield 2
            raise ValueError("no more")
        finally:
            closed.append(True)

    ahead = Prefetch(items(), lambda item: 10 * item)
    assert [next(ahead), next(ahead)] == [0, 10]
    assert not ahead.ready
    go_on.set()
    assert next(ahead) == 20
    with pytest.raises(ValueError, match="no more"):
        next(ahead)
    ahead.close()
    assert closed == [True]
