# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import numpy as np
import pytest

from evit_jax import steps
from evit_jax.errors import InputError
from evit_jax.models import init_params
from evit_jax.parallel import DataParallel
from tests.test_steps import BATCH, CARD, MODEL, init, make_batch, make_step


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


def gradients(devices):
    """Loss and gradients of the first step."""
    function = functools.partial(
        jax.value_and_grad(steps.loss_and_metrics, has_aux=True),
        model=MODEL,
        preprocessing=CARD,
        label_smoothing=0.1,
    )

    def step(params, batch):
        (loss, _), grads = function(params, batch, jax.random.key(0))
        return loss, grads

    params = devices.init(functools.partial(init_params, MODEL), jax.random.key(0))
    return devices.compile_eval(step)(params, devices.put(make_batch()))


def test_four_devices_take_the_first_step_of_one():
    (one, one_grads), (four, four_grads) = (
        gradients(DataParallel(jax.devices()[:count])) for count in (1, 4)
    )
    assert relative(four, one) < 1e-6
    whole = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(one_grads)))
    errors = jax.tree.map(lambda a, b: np.linalg.norm(np.asarray(a) - np.asarray(b)), one_grads,
                          four_grads)  # fmt: skip
    assert np.sqrt(sum(error**2 for error in jax.tree.leaves(errors))) / whole < 1e-6


def test_four_devices_follow_one_for_several_steps():
    losses = {}
    for count in (1, 4):
        devices = DataParallel(jax.devices()[:count])
        step, state = devices.compile_train(make_step()), devices.init(init, jax.random.key(0))
        for number in range(5):
            state, loss = step(state, devices.put(make_batch(number)))
            losses.setdefault(count, []).append(float(loss))
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-4)


def test_batches_are_split_and_states_are_not():
    devices = DataParallel()
    batch = devices.put(make_batch())
    assert {shard.data.shape[0] for shard in batch["image"].addressable_shards} == {BATCH // 4}
    state = devices.init(init, jax.random.key(0))
    kernel = state["params"]["head"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [kernel.shape] * 4


def test_the_state_is_given_up_so_that_its_memory_is_reused():
    devices = DataParallel()
    state = devices.init(init, jax.random.key(0))
    devices.compile_train(make_step())(state, devices.put(make_batch()))
    assert state["params"]["head"]["kernel"].is_deleted()


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match=r"multiple of the 4 device\(s\), got 10; try 8"):
        DataParallel().check_batch_size(10)
    DataParallel().check_batch_size(12)
