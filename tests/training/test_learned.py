# SPDX-License-Identifier: Apache-2.0
"""Methods that learn, in the training step: on devices, for chips, resumed, and what they reach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.plan import stages
from evit_jax.plan.counts import PLAN_FIELDS
from evit_jax.plan.flops import macs
from evit_jax.runtime.parallel import DataParallel, PmapParallel
from evit_jax.training import losses, optim, steps
from evit_jax.training.checkpoint import Checkpoints
from evit_jax.training.mix import Mix
from evit_jax.training.teachers import open_teacher
from tests.scripts import learned_methods
from tests.training.test_steps import CARD, make_batch, make_recipe

SIZES = dict(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=3)
SPECS = ["dynamicvit", "diffrate_search", "cropr", "sit", "patchmerger", "stvit", "ats"]


def some_of_them(*quick):
    """Parametrizes with every method; those that are not named are slow."""
    params = [pytest.param(s, marks=[] if s in quick else pytest.mark.slow) for s in SPECS]
    return pytest.mark.parametrize("spec", params)


def build(spec, **changes):
    return build_model("vit", **SIZES | dict(reducer=spec, keep_rate=0.6, layers=(0, 1)) | changes)


def start(model, optimizer):
    return lambda key: steps.init_state(init_params(model, key), optimizer, ema=False)


def taught(model, optimizer, **changes):
    """A recipe with the dense twin as the teacher of logits and tokens."""
    soft = losses.Distillation(hard=False, alpha=0.3, tokens=0.5)
    own = dict(distillation=soft, teacher=model.clone(keep=()), mix=Mix(mixup=0.8))
    return make_recipe(optimizer=optimizer, **own | changes)


def first_step(devices, model, accumulate=1):
    """The gradients of the first step, from plain descent, and its figures."""
    descent, batch = optax.sgd(1.0), make_batch(size=16)
    recipe = taught(model, descent, accumulate=accumulate)
    state = devices.init(start(model, descent), jax.random.key(0))
    before = jax.tree.map(np.array, state["params"])
    step = functools.partial(steps.train_step, models=(model,), recipe=recipe)
    after, figures = devices.compile_train(step, state, batch, {})(state, devices.put(batch), {})
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, after["params"]), figures


@some_of_them("dynamicvit")
def test_a_step_is_the_same_however_it_is_shared(spec):
    model = build(spec)
    grads, figures = first_step(DataParallel(jax.devices()[:1]), model)
    with_some = [name for name in grads if "reduction" in grads[name]]
    assert with_some == ([] if spec == "ats" else ["blocks_0", "blocks_1"])
    for name in with_some:
        learned = jax.tree.leaves(grads[name]["reduction"])
        assert all(np.isfinite(leaf).all() for leaf in learned)
        assert max(np.abs(leaf).max() for leaf in learned) > 0
    others, same = first_step(PmapParallel(), model, accumulate=2)
    # Recovered as a difference of parameters, so a rounding of those (1 ulp of 1) is in it.
    difference = optax.tree.norm(jax.tree.map(np.subtract, others, grads))
    assert difference < 1e-5 * optax.tree.norm(grads)
    np.testing.assert_allclose(same["loss"], figures["loss"], rtol=1e-5)


@some_of_them("dynamicvit", "diffrate_search")
@pytest.mark.parametrize("platform", ["tpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_a_step_lowers_for_a_chip(spec, platform):
    model = build(spec, dtype="bfloat16", remat=True)
    optimizer = optax.sgd(1.0)
    shapes = jax.eval_shape(start(model, optimizer), jax.random.key(0))
    batch = steps.batch_shapes(model.image_size, 8)
    recipe = taught(model, optimizer)
    step = functools.partial(steps.train_step, models=(model,), recipe=recipe)
    lowered = jax.jit(step).trace(shapes, batch, {}).lower(lowering_platforms=(platform,))
    assert "stablehlo" in lowered.as_text()


@some_of_them()
def test_a_resumed_run_is_bit_identical_and_a_frozen_backbone_stays(spec, tmp_path):
    model, groups = build(spec), dict(backbone_lr=0.1, backbone_start=2) if spec != "ats" else {}
    optimizer, _ = optim.create(
        lr=1e-2, min_lr=1e-3, warmup_lr=0.0, warmup_steps=0, total_steps=9, weight_decay=0.1,
        clip_norm=1.0, b1=0.9, b2=0.999, **groups,
    )  # fmt: skip
    recipe = taught(model, optimizer)
    step = jax.jit(functools.partial(steps.train_step, models=(model,), recipe=recipe))
    state = first = jax.jit(start(model, optimizer))(jax.random.key(0))
    seen = []
    for number in range(4):
        state, _ = step(state, make_batch(number), {})
        seen.append(state)
    saved = Checkpoints(tmp_path)
    saved.save(2, seen[1])
    saved.wait()
    again = Checkpoints(tmp_path).restore(DataParallel(jax.devices()[:1]).placed(first))
    for number in (2, 3):
        again, _ = step(again, make_batch(number), {})
    jax.tree.map(np.testing.assert_array_equal, again, state)
    for at, frozen in ((1, True), (3, False)) if groups else ():
        for name in ("head", "pos_embed"):
            same = jax.tree.map(
                lambda a, b: (a == b).all(), seen[at]["params"][name], first["params"][name]
            )
            assert all(jax.tree.leaves(same)) == frozen
        learned = (tree["params"]["blocks_1"]["reduction"] for tree in (seen[at], first))
        moved = jax.tree.map(lambda a, b: (a != b).any(), *learned)
        assert any(jax.tree.leaves(moved))


def test_the_loss_has_what_heads_reported_and_what_tokens_lack():
    model = build("cropr")
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    state = steps.init_state(params, optax.sgd(1.0), ema=False)
    batch = make_batch()
    recipe = taught(model, optax.sgd(1.0), mix=Mix())
    step = functools.partial(steps.train_step, models=(model,), recipe=recipe)
    _, figures = jax.jit(step)(state, batch, {})
    images = CARD.normalize(jnp.asarray(batch["image"]))
    train = jax.jit(functools.partial(model.apply, train=True))
    logits, out = train({"params": params}, images)
    dense, teacher = jax.jit(model.clone(keep=()).apply)({"params": params}, images)
    targets = losses.smooth_labels(jnp.asarray(batch["label"]), 3, 0.1)
    expected = 0.7 * losses.cross_entropy(logits, targets)
    expected += 0.3 * losses.divergence(logits, jax.nn.softmax(dense))
    expected += sum(losses.cross_entropy(head, targets) for head in out["aux"]["logits"])
    square = np.asarray(jnp.square(out["dense"] - teacher["dense"]).mean(axis=-1))
    kept = np.asarray(out["owner"][-1]) >= 0
    expected += 0.5 * np.array([row[mask].mean() for row, mask in zip(square, kept, strict=True)])
    assert len(out["aux"]["logits"]) == 2
    np.testing.assert_allclose(figures["loss"], expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_rates_that_change_are_for_methods_that_serve_several(spec):
    model = build(spec)
    plan = dict.fromkeys(PLAN_FIELDS) | dict(keep_rate=0.6, layers=(0, 1), multiple_of=1)
    assert len(stages.open_table(model, plan)) == 1
    for settings in (dict(rates=(1.0, 0.6)), dict(length=10)):
        if spec in ("cropr", "ats"):
            assert stages.open_table(model, plan, **settings)
            continue
        with pytest.raises(InputError, match="learns is for one plan, so rates cannot change"):
            stages.open_table(model, plan, **settings)


def test_a_teacher_of_tokens_is_a_model_like_the_student():
    settings = dict(weights="", hard=False, alpha=0.3, temperature=1.0, tokens=0.5)
    assert open_teacher(build("dynamicvit"), teacher="self", **settings).distillation.tokens == 0.5
    for teacher in ("", "logits.npy"):
        with pytest.raises(InputError, match="needs a teacher that is a model"):
            open_teacher(build("dynamicvit"), teacher=teacher, **settings)
    student = build("dynamicvit", image_size=32, patch_size=16)
    with pytest.raises(InputError, match="needs a teacher with the student's width and grid"):
        open_teacher(student, teacher="deit_tiny_patch16_224", **settings | dict(weights="none"))


@pytest.mark.slow
def test_200_steps_on_digits_lower_a_methods_own_loss_and_end_above_random():
    # The other methods are in the script's table, see docs/methods.md.
    learned, model = learned_methods.follow("cropr")
    plain, other = learned_methods.follow("random")
    before, after = learned["loss"]
    assert after < 0.8 * before
    assert abs(macs(model) / macs(other) - 1) < 0.05
    assert learned["top1"][1] > plain["top1"][1]
