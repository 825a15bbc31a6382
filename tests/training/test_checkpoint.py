# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.runtime.parallel import DataParallel
from evit_jax.training.checkpoint import Checkpoints


def state_of(value, devices=None):
    return DataParallel(devices).init(
        lambda: dict(step=jnp.int32(value), params=dict(a=jnp.full((4, 3), value, jnp.float32)))
    )


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_state_comes_back_exactly_and_on_other_devices(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest is None
    checkpoints.save(7, state_of(7))
    checkpoints.wait()
    like = state_of(0, jax.devices()[:2])
    restored = Checkpoints(tmp_path / "c").restore(like)
    same(restored, state_of(7))
    assert restored["params"]["a"].sharding == like["params"]["a"].sharding


def test_the_state_may_be_given_up_while_it_is_being_written(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = state_of(3)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    checkpoints.save(3, state)
    overwrite(state)
    checkpoints.wait()
    same(checkpoints.restore(state_of(0)), state_of(3))


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, top1 in ((1, 0.1), (2, 0.5), (3, None), (4, 0.3), (5, None)):
        checkpoints.save(step, state_of(step), None if top1 is None else dict(test_top1=top1))
    checkpoints.wait()
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 5]
    assert checkpoints.latest == 5


def test_what_a_killed_save_left_behind_is_no_hindrance(tmp_path):
    first = Checkpoints(tmp_path)
    first.save(1, state_of(1))
    first.wait()
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    (unfinished / "state").write_text("half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest == 1
    same(checkpoints.restore(state_of(0)), state_of(1))
    checkpoints.save(2, state_of(2))
    checkpoints.wait()
    same(checkpoints.restore(state_of(0)), state_of(2))


def test_reading_leaves_a_running_save_alone(tmp_path):
    running = Checkpoints(tmp_path)
    running.save(1, state_of(1))
    running.wait()
    unfinished = tmp_path / "2.orbax-checkpoint-tmp"
    unfinished.mkdir()
    loaded = Checkpoints(tmp_path, read_only=True).load()
    np.testing.assert_array_equal(loaded["params"]["a"], state_of(1)["params"]["a"])
    assert unfinished.exists()
    with pytest.raises(InputError, match="does not exist"):
        Checkpoints(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


def test_a_failed_save_says_what_is_safe(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state_of(1))
    checkpoints.wait()

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmore lines")

    monkeypatch.setattr(checkpoints.manager, "save", full)
    with pytest.raises(InputError, match=r"No space left on device.*step 1 is complete.*make room"):
        checkpoints.save(2, state_of(2))
