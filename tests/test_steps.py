# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax import metrics, optim, plan, steps
from evit_jax.models import build_model, init_params
from evit_jax.parallel import DataParallel
from evit_jax.preprocessing import Preprocessing

BATCH = 8
CARD = Preprocessing()
MODEL = build_model(
    "vit", image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=3,
    keep_rate=0.5, drop_path_rate=0.2,
)  # fmt: skip
OPTIMIZER, _ = optim.create(
    lr=1e-2, min_lr=1e-3, warmup_lr=0.0, warmup_steps=0, total_steps=50, weight_decay=0.01,
    clip_norm=1.0, b1=0.9, b2=0.999,
)  # fmt: skip


def make_batch(seed=0, size=BATCH):
    """Images whose brightness tells their class."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, size).astype(np.int32)
    image = 80 * label[:, None, None, None] + rng.integers(0, 80, (size, 16, 16, 3))
    return dict(image=image.astype(np.uint8), label=label)


def make_step(model=MODEL, **changes):
    settings = dict(label_smoothing=0.1, ema_decay=0.9, seed=0) | changes
    return functools.partial(
        steps.train_step, model=model, optimizer=OPTIMIZER, preprocessing=CARD, **settings
    )


@functools.partial(jax.jit, static_argnames="ema")
def init(key, ema=False):
    return steps.init_state(init_params(MODEL, key), OPTIMIZER, ema=ema)


def test_training_learns():
    step = jax.jit(make_step())
    state = init(jax.random.key(0))
    losses = []
    for number in range(30):
        state, loss = step(state, make_batch(number))
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    sums = steps.eval_step(
        state["params"],
        make_batch(99) | dict(mask=np.ones(BATCH, bool)),
        model=MODEL.clone(keep=()),
        preprocessing=CARD,
    )
    assert float(sums["top1"]) / BATCH > 0.8


def test_metrics_add_up_in_the_state_and_the_step_counts():
    step = jax.jit(make_step())
    state = init(jax.random.key(0))
    state, first = step(state, make_batch(0))
    state, second = step(state, make_batch(1))
    assert int(state["step"]) == 2
    assert float(state["metrics"]["images"]) == 2 * BATCH
    mean = metrics.means([state["metrics"]], "train")["train_loss"]
    assert mean == pytest.approx((float(first) + float(second)) / 2, rel=1e-6)


def test_randomness_is_a_function_of_seed_and_step():
    state, batch = init(jax.random.key(0)), make_batch()
    (_, a), (_, b) = jax.jit(make_step())(state, batch), jax.jit(make_step())(state, batch)
    assert float(a) == float(b)
    _, other_seed = jax.jit(make_step(seed=1))(state, batch)
    _, other_step = jax.jit(make_step())(state | dict(step=jnp.int32(1)), batch)
    assert len({float(a), float(other_seed), float(other_step)}) == 3


def test_the_average_is_evaluated_and_starts_short():
    step = jax.jit(make_step(ema_decay=0.9999))
    state = init(jax.random.key(0), ema=True)
    before = state["params"]["head"]["kernel"]
    state, _ = step(state, make_batch())
    # 1/10 of the old and 9/10 of the new after the first step.
    expected = before / 10 + state["params"]["head"]["kernel"] * 9 / 10
    np.testing.assert_allclose(state["ema"]["head"]["kernel"], expected, rtol=1e-5, atol=1e-7)
    assert steps.eval_params(state) is state["ema"]
    without = init(jax.random.key(0))
    assert steps.eval_params(without) is without["params"]


def test_evaluation_leaves_padding_out():
    params = init(jax.random.key(0))["params"]
    batch = make_batch()
    evaluate = jax.jit(functools.partial(steps.eval_step, model=MODEL, preprocessing=CARD))
    half = {name: array[:5] for name, array in batch.items()} | dict(mask=np.ones(5, bool))
    masked = batch | dict(mask=np.arange(BATCH) < 5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5),
        evaluate(params, masked),
        evaluate(params, half),
    )


def test_one_program_is_compiled_per_stage():
    stages = plan.stages(lambda left: MODEL.plan(keep_rate=0.5, left=left), 0.5, length=9, rungs=2)
    assert len(stages) == 3
    traces = []

    def counted(state, batch, *, model):
        traces.append(model.keep)
        return make_step(model)(state, batch)

    devices = DataParallel()
    programs = {
        stage.keep: devices.compile_train(
            functools.partial(counted, model=MODEL.clone(keep=stage.keep))
        )
        for stage in stages
    }
    state = devices.init(init, jax.random.key(0))
    for step in range(20):
        keep = plan.stage_at(stages, step).keep
        state, _ = programs[keep](state, devices.put(make_batch(step)))
    assert traces == [stage.keep for stage in stages]


def test_batch_shapes_are_those_of_a_batch():
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), steps.batch_shapes((16, 16), BATCH))
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), make_batch())
