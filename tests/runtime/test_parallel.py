# SPDX-License-Identifier: Apache-2.0
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.runtime.parallel import DataParallel, PmapParallel, choose
from evit_jax.runtime.processes import start_processes
from evit_jax.training import steps
from evit_jax.training.checkpoint import Checkpoints
from evit_jax.training.losses import Distillation
from evit_jax.training.mix import Mix
from tests.scripts.whole_recipe import MODEL as WHOLE_MODEL
from tests.scripts.whole_recipe import OPTIMIZER, follow, init
from tests.training.test_steps import BATCH, CARD, MODEL, make_batch, make_step
from tests.training.test_steps import init as init_small

ROOT = Path(__file__).parents[2]
MODES = {
    "jit on one device": lambda: DataParallel(jax.devices()[:1]),
    "jit": DataParallel,
    "jit with sharded state": lambda: DataParallel(shard_params=True),
    "pmap": PmapParallel,
}


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def alone():
    """The whole recipe on one device: losses of 20 steps, gradients of the first."""
    losses, grads, _ = follow(MODES["jit on one device"]())
    return losses, grads


def assert_same_run(losses, grads, alone):
    assert relative(grads, alone[1]) < 1e-6
    np.testing.assert_allclose(losses, alone[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("mode", "accumulate"),
    [
        pytest.param("jit on one device", 4, marks=pytest.mark.slow),
        ("jit", 1),
        pytest.param("jit", 4, marks=pytest.mark.slow),
        ("jit with sharded state", 1),
        pytest.param("pmap", 1, marks=pytest.mark.slow),
        ("pmap", 4),
    ],
)
def test_the_whole_recipe_is_the_same_however_it_is_shared(mode, accumulate, alone):
    losses, grads, _ = follow(MODES[mode](), accumulate=accumulate)
    assert len(losses) == 20
    assert_same_run(losses, grads, alone)


def free_address():
    """Where processes may meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_two_processes_of_two_devices_are_one_run(mode, alone, tmp_path):
    address = free_address()
    out = tmp_path / "out.npz"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.scripts.whole_recipe", mode, "2", f"{address},2,{number}",
             out],
            cwd=ROOT, env=os.environ | dict(JAX_NUM_CPU_DEVICES="2"), stderr=subprocess.PIPE,
        )
        for number in range(2)
    ]  # fmt: skip
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err.decode()[-2000:]
    with np.load(out) as figures:
        assert_same_run(figures["losses"], figures["grads"], alone)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices_and_another_mode(alone, tmp_path):
    losses, grads, state = follow(MODES["jit on one device"](), last=8)
    for number, name in enumerate(["jit with sharded state", "pmap"]):
        folder, devices = tmp_path / str(number), MODES[name]()
        saved = Checkpoints(folder)
        saved.save(8, state)
        saved.wait()
        like = devices.init(init, jax.random.key(1))
        rest, _, _ = follow(devices, first=8, state=Checkpoints(folder).restore(like))
        assert_same_run(np.concatenate([losses, rest]), grads, alone)


def test_a_sharded_state_has_a_part_of_every_large_array_on_each_device():
    state = DataParallel(shard_params=True).init(init, jax.random.key(0))
    mu = state["opt_state"][1][0].mu
    for tree in (state["params"], state["ema"], mu):
        kernel = tree["blocks_0"]["mlp"]["fc1"]["kernel"]
        assert [shard.data.size for shard in kernel.addressable_shards] == [kernel.size // 4] * 4
        assert tree["norm"]["scale"].sharding.is_fully_replicated


def test_gathered_parameters_are_whole_and_their_gradients_are_in_parts():
    devices = DataParallel(shard_params=True)
    params = devices.init(init, jax.random.key(0))["params"]["blocks_0"]["mlp"]["fc1"]

    def total(params):
        whole = devices.gather(params)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(whole)), whole

    grads, whole = jax.jit(jax.grad(total, has_aux=True))(params)
    assert whole["kernel"].sharding.is_fully_replicated
    for name, value in params.items():
        assert grads[name].sharding.is_equivalent_to(value.sharding, value.ndim)
        np.testing.assert_allclose(grads[name], 2 * np.asarray(value))


def test_batches_are_split_and_states_are_not():
    devices = DataParallel()
    batch = devices.put(make_batch())
    assert {shard.data.shape[0] for shard in batch["image"].addressable_shards} == {BATCH // 4}
    state = devices.init(init, jax.random.key(0))
    kernel = state["params"]["head"]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [kernel.shape] * 4


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_the_state_is_given_up_so_that_its_memory_is_reused(mode):
    devices = MODES[mode]()
    state = devices.init(init_small, jax.random.key(0))
    program = devices.compile_train(make_step(), state, make_batch(), {})
    program(state, devices.put(make_batch()), {})
    assert state["params"]["head"]["kernel"].is_deleted()


def test_a_step_that_does_not_fit_is_refused_with_what_helps(monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM\nSee ...")

    monkeypatch.setattr(jax.stages.Lowered, "compile", exhausted)
    state = jax.eval_shape(init_small, jax.random.key(0))
    with pytest.raises(InputError, match=r"lower batch_size.*Ran out of memory on HBM$"):
        DataParallel().compile_train(make_step(), state, make_batch(), {})


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_evaluation_is_the_same_in_every_mode(mode):
    params = init_small(jax.random.key(0))["params"]
    batch = make_batch() | dict(mask=np.arange(BATCH) < 6)
    step = functools.partial(steps.eval_step, model=MODEL, preprocessing=CARD)
    devices = MODES[mode]()
    sums = devices.compile_eval(step)(devices.init(dict, params), devices.put(batch))
    for name, expected in step(params, batch).items():
        assert float(sums[name]) == pytest.approx(float(expected), rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused():
    devices = DataParallel()
    devices.check_batch_size("batch_size", 12)
    devices.check_batch_size("batch_size", 32, accumulate=4, pairs=True)
    for size, settings, message in [
        (10, {}, r"multiple of the 4 device\(s\), got 10; try 8"),
        (24, dict(accumulate=4), r"multiple of 16 \(4 device\(s\) x 4 micro-batches\)"),
        (12, dict(pairs=True), r"multiple of 8 \(4 device\(s\) x 2, as images are mixed in pairs"),
    ]:
        with pytest.raises(InputError, match=message):
            devices.check_batch_size("batch_size", size, **settings)


def test_modes_and_processes_that_do_not_exist_are_refused():
    with pytest.raises(InputError, match="unknown parallel mode 'pamp'; did you mean 'pmap'"):
        choose("pamp")
    with pytest.raises(InputError, match="shard_params needs jit"):
        choose("pmap", shard_params=True)
    with pytest.raises(InputError, match=r"chips need run\.parallel=jit"):
        choose("pmap", chips="v5e:2x2")
    for text in ("4", "host:1,2,2", "host,2,0", ":1,2,0", "host:x,2,0"):
        with pytest.raises(InputError, match="HOST:PORT,COUNT,NUMBER"):
            start_processes(text)


def test_an_images_place_does_not_depend_on_the_order_of_devices():
    """As on TPU slices, whose devices are listed by where they are."""
    shuffled = DataParallel([jax.devices()[i] for i in (2, 0, 3, 1)])
    batch = shuffled.put(dict(label=np.arange(8)))["label"]
    places = {shard.device.id: shard.index[0].start for shard in batch.addressable_shards}
    assert [places[device.id] for device in jax.devices()] == [0, 2, 4, 6]


def test_a_teacher_is_placed_as_the_state_is():
    devices = DataParallel(shard_params=True)
    params = init(jax.random.key(5))["params"]
    frozen = devices.init(dict, dict(teacher=params))
    state = devices.init(init, jax.random.key(0))
    recipe = steps.Recipe(
        preprocessing=CARD,
        optimizer=OPTIMIZER,
        mix=Mix(),
        distillation=Distillation(),
        teacher=WHOLE_MODEL.clone(keep=()),
    )
    step = functools.partial(steps.train_step, models=(WHOLE_MODEL,), recipe=recipe)
    shapes = steps.batch_shapes(WHOLE_MODEL.image_size, 32)
    batch = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    program = devices.compile_train(step, state, shapes, frozen)
    _, figures = program(state, devices.put(batch), frozen)
    assert np.isfinite(float(figures["loss"]))


def test_a_state_is_restored_without_a_second_one_beside_it():
    devices = DataParallel(shard_params=True)
    state = devices.init(init, jax.random.key(0))
    placed = devices.placed(jax.eval_shape(init, jax.random.key(0)))
    jax.tree.map(lambda a, b: assert_equal(a.sharding, b.sharding), placed, state)


def assert_equal(a, b):
    assert a == b
