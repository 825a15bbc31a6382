# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax.models import build_model, init_params
from evit_jax.models.card import Preprocessing
from evit_jax.plan import stages
from evit_jax.runtime.background import Programs
from evit_jax.runtime.parallel import DataParallel, PmapParallel
from evit_jax.training import losses, metrics, optim, steps
from evit_jax.training.mix import Mix

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


WHOLE = Mix(erasing=0.5, mixup=0.8, cutmix=1.0)


def make_recipe(**changes):
    plain = dict(preprocessing=CARD, optimizer=OPTIMIZER, mix=Mix(), label_smoothing=0.1)
    return steps.Recipe(**plain | dict(ema_decay=0.9) | changes)


def make_step(*models, **changes):
    """(state, batch, frozen={}) -> (state, figures)."""

    def step(state, batch, frozen=None, axis=None):
        models_ = models or (MODEL,)
        recipe = make_recipe(**changes)
        return steps.train_step(
            state, batch, frozen or {}, models=models_, recipe=recipe, axis=axis
        )

    return step


@functools.partial(jax.jit, static_argnames="ema")
def init(key, ema=False):
    return steps.init_state(init_params(MODEL, key), OPTIMIZER, ema=ema)


def test_training_learns():
    step = jax.jit(make_step())
    state = init(jax.random.key(0))
    seen = []
    for number in range(30):
        state, figures = step(state, make_batch(number))
        seen.append(float(figures["loss"]))
    assert np.mean(seen[-5:]) < 0.7 * np.mean(seen[:5])
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
    assert mean == pytest.approx(float(first["loss"] + second["loss"]) / 2, rel=1e-6)


def test_randomness_is_a_function_of_seed_and_step():
    state, batch = init(jax.random.key(0)), make_batch()

    def loss(state=state, **changes):
        return float(jax.jit(make_step(**changes))(state, batch)[1]["loss"])

    assert loss() == loss()
    assert len({loss(), loss(seed=1), loss(state | dict(step=jnp.int32(1)))}) == 3


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


def first_step(*models, frozen=None, batch=None, state=None, **changes):
    """(parameters' gradients recovered from plain descent, figures) of one step."""
    descent = optax.sgd(1.0)
    state = state or init(jax.random.key(0))
    state = state | dict(opt_state=descent.init(state["params"]))
    step = jax.jit(make_step(*models, optimizer=descent, **changes))
    after, figures = step(state, batch or make_batch(), frozen)
    return jax.tree.map(jnp.subtract, state["params"], after["params"]), figures


def assert_close(a, b, tolerance=1e-6):
    """As vectors, relative to the length of b."""
    error, length = optax.tree.norm(jax.tree.map(jnp.subtract, a, b)), optax.global_norm(b)
    assert float(error) < tolerance * float(length)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_gradients_of_the_whole_one(parts):
    whole, once = first_step(mix=WHOLE)
    grads, figures = first_step(mix=WHOLE, accumulate=parts)
    # Recovered as a difference of parameters, so a rounding of those (1 ulp of 1) is in it.
    assert_close(grads, whole, 1e-5)
    assert float(figures["loss"]) == pytest.approx(float(once["loss"]), rel=1e-6)
    assert float(figures["grad_norm"]) == pytest.approx(float(once["grad_norm"]), rel=1e-6)


NORMED = build_model(
    "lvvit", image_size=16, patch_size=4, width=16, depth=1, num_heads=2, num_classes=3, filters=4
)


@pytest.mark.parametrize(
    ("mode", "accumulate"), [("jit", 1), ("jit", 2), ("pmap", 1), ("jit, sharded", 1)]
)
def test_running_statistics_are_replaced_and_averaged_over_parts_and_time(mode, accumulate):
    """Each micro-batch, and under pmap each device, has statistics of its own; else the batch."""
    devices = PmapParallel() if mode == "pmap" else DataParallel(shard_params="sharded" in mode)
    batch, recipe = make_batch(), make_recipe(accumulate=accumulate)
    state = devices.init(
        lambda key: steps.init_state(init_params(NORMED, key), OPTIMIZER, ema=True),
        jax.random.key(0),
    )
    before = jax.tree.map(np.asarray, state["params"])
    step = functools.partial(steps.train_step, models=(NORMED,), recipe=recipe)
    program = devices.compile_train(step, state, batch, {})
    after, _ = program(state, devices.put(batch), {})

    parts = np.arange(BATCH)[None]
    if accumulate > 1:
        parts = np.asarray(steps.split(jnp.arange(BATCH), accumulate))
    if mode == "pmap":
        parts = parts.reshape(jax.device_count(), -1)
    learn = jax.jit(lambda p, x: NORMED.apply({"params": p}, x, train=True)[1]["statistics"])
    seen = [learn(before, CARD.normalize(jnp.asarray(batch["image"][part]))) for part in parts]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *seen)["patch_embed"]
    for name, leaves in expected.items():
        for leaf, value in leaves.items():
            got = after["params"]["patch_embed"][name][leaf]
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)
            average = 0.1 * before["patch_embed"][name][leaf] + 0.9 * value
            average_got = after["ema"]["patch_embed"][name][leaf]
            np.testing.assert_allclose(average_got, average, rtol=1e-5, atol=1e-6)
    assert (after["params"]["patch_embed"]["bn1"]["scale"] != 1).any()


def test_only_the_user_splits_a_batch_that_is_normalized_as_a_whole():
    assert steps.micro_batches(NORMED, 4096, platform="cpu") == 1


def test_splitting_keeps_neighbors_together_and_loses_nothing():
    parts = np.asarray(steps.split(jnp.arange(16), 4))
    assert parts.shape == (4, 4)
    assert sorted(parts.ravel()) == list(range(16))
    assert (parts[:, ::2] % 2 == 0).all()
    assert (parts[:, 1::2] == parts[:, ::2] + 1).all()


def test_a_sandwich_averages_labels_loss_and_matches_the_largest_to_the_others():
    still = [m.clone(drop_path_rate=0.0) for m in (MODEL.clone(keep=()), MODEL)]
    batch, params = make_batch(), init(jax.random.key(0))["params"]
    _, figures = first_step(*still)
    dense, small = (m.apply({"params": params}, CARD.normalize(batch["image"]))[0] for m in still)
    targets = losses.smooth_labels(batch["label"], 3, 0.1)
    match = losses.divergence(small, jax.nn.softmax(dense))
    each = losses.cross_entropy(dense, targets) + losses.cross_entropy(small, targets) + match
    assert float(figures["loss"]) == pytest.approx(float(each.mean()) / 2, rel=1e-5)
    assert float(match.mean()) > 0


def teacher_figures(**changes):
    state, batch = init(jax.random.key(0)), make_batch()
    return first_step(MODEL.clone(drop_path_rate=0.0), state=state, batch=batch, **changes)


def test_a_teacher_is_a_model_its_logits_or_the_dense_twin():
    dense = MODEL.clone(keep=(), drop_path_rate=0.0)
    params, batch = init(jax.random.key(0))["params"], make_batch()
    soft = losses.Distillation(hard=False, alpha=0.7, temperature=2.0)
    named, _ = teacher_figures(distillation=soft, teacher=dense, frozen=dict(teacher=params))
    twin, _ = teacher_figures(distillation=soft, teacher=dense)
    logits, _ = dense.apply({"params": params}, CARD.normalize(batch["image"]))
    stored, _ = first_step(
        MODEL.clone(drop_path_rate=0.0), batch=batch | dict(teacher=logits), distillation=soft
    )
    without, _ = teacher_figures()
    assert_close(twin, named, 1e-5)
    assert_close(stored, named, 1e-5)
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, without, named))) > 0.01
    other = init(jax.random.key(1))["params"]
    stranger, _ = teacher_figures(distillation=soft, teacher=dense, frozen=dict(teacher=other))
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, stranger, named))) > 1e-3


def test_a_distilled_students_second_head_learns_the_teacher_alone():
    student = build_model(
        "vit", image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=3,
        distilled=True, keep_rate=0.5,
    )  # fmt: skip
    params = init_params(student, jax.random.key(0))
    state = steps.init_state(params, OPTIMIZER, ema=False)
    batch = make_batch() | dict(teacher=np.eye(3, dtype=np.float32)[np.zeros(BATCH, int)])
    hard = losses.Distillation(alpha=0.5)
    grads, figures = first_step(student, state=state, batch=batch, distillation=hard)
    _, out = student.apply({"params": params}, CARD.normalize(batch["image"]))
    base = losses.cross_entropy(out["logits_cls"], losses.smooth_labels(batch["label"], 3, 0.1))
    taught = losses.cross_entropy(out["logits_dist"], jax.nn.one_hot(np.zeros(BATCH, int), 3))
    assert float(figures["loss"]) == pytest.approx(float((base + taught).mean()) / 2, rel=1e-5)
    expected = (jax.nn.softmax(out["logits_dist"]) - jnp.eye(3)[:1]).mean(0) / 2
    np.testing.assert_allclose(grads["head_dist"]["bias"], expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_of_other_preprocessing_sees_what_it_expects():
    there = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.2, 0.3))
    image = make_batch()["image"]
    seen = CARD.renormalize(CARD.normalize(image), there)
    np.testing.assert_allclose(seen, there.normalize(image), rtol=1e-5, atol=1e-5)


def test_one_program_is_compiled_per_stage():
    table = stages.stages(lambda r: MODEL.plan(keep_rate=0.5, remaining=r), 0.5, length=9, rungs=2)
    assert len(table) == 3
    traces, devices = [], DataParallel()
    state = devices.init(init, jax.random.key(0))

    def build(stage):
        def counted(*args):
            traces.append(stage.keep)
            return make_step(MODEL.clone(keep=stage.keep))(*args)

        return devices.compile_train(counted, state, make_batch(), {})

    programs = Programs(build)
    for step in range(20):
        stage = stages.stage_at(table, step)
        for other in table:
            programs.start(other)
        state, _ = programs[stage](state, devices.put(make_batch(step)), {})
    assert traces == [stage.keep for stage in table]


def test_batch_shapes_are_those_of_a_batch():
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), steps.batch_shapes((16, 16), BATCH))
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), make_batch())
