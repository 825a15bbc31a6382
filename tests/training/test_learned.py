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
from evit_jax.runtime.parallel import DataParallel, PmapParallel
from evit_jax.training import losses, optim, steps
from evit_jax.training.checkpoint import Checkpoints
from evit_jax.training.mix import Mix
from evit_jax.training.teachers import open_teacher
from tests.scripts import learned_methods
from tests.training.test_steps import CARD, make_batch, make_recipe

SIZES = dict(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=3)
RECOVERS = "sit:recovery=True"
SPECS = [
    "dynamicvit", "diffrate_search", "cropr", "sit", RECOVERS, "patchmerger", "stvit", "ats",
]  # fmt: skip


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


# One that draws, one that recovers tokens, one without parameters.
@pytest.mark.slow
@pytest.mark.parametrize("spec", ["dynamicvit", RECOVERS, "ats"])
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


@pytest.mark.parametrize(
    "mix",
    [
        pytest.param(Mix(), marks=pytest.mark.slow, id="plain"),
        pytest.param(Mix(token=1.0), id="MixToken"),
    ],
)
def test_the_loss_has_what_recovered_tokens_lack(mix):
    model = build(RECOVERS, depth=3, layers=(1, 2))
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    batch, key = make_batch(), jax.random.key(5)
    index = jnp.arange(len(batch["label"]))
    recipe = taught(model, optax.sgd(1.0), mix=mix)

    @jax.jit
    def step(params):
        return steps.gradients(params, {}, batch, index, key, models=(model,), recipe=recipe)

    grads, loss, *_ = step(params)
    mix_key, _ = jax.random.split(key)
    images, targets, given = steps.prepare(batch, index, mix_key, model=model, recipe=recipe)
    train = jax.jit(functools.partial(model.apply, train=True))
    logits, out = train({"params": params}, images, **given)
    dense, teacher = jax.jit(model.clone(keep=()).apply)({"params": params}, images)
    share, swap = 1.0, np.zeros((16, 1), bool)
    if given:
        swap = np.asarray(given["swap"][0])[:, None]
        assert 0 < swap.sum() < 16
        share = 1 - swap.mean()
    partners = np.arange(len(images)) ^ 1
    probabilities = np.asarray(jax.nn.softmax(dense))
    probabilities = share * probabilities + (1 - share) * probabilities[partners]
    expected = 0.7 * losses.cross_entropy(logits, targets["label"])
    expected += 0.3 * losses.divergence(logits, probabilities)
    recovered = np.asarray(out["aux"]["recovered"], np.float64)
    assert recovered.shape == (2, len(images), 16, 16)
    for ours, theirs in zip(recovered, teacher["blocks"][1:], strict=True):
        theirs = np.asarray(theirs[:, 1:], np.float64)  # without the class token
        theirs = np.where(swap, theirs[partners], theirs)
        expected += 0.5 / 2 * ((ours - theirs) ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
    assert "recovery" not in grads["blocks_0"]
    for name in ("blocks_1", "blocks_2"):
        assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[name]["recovery"]))


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


def test_recovered_tokens_need_a_teacher_with_the_students_blocks():
    settings = dict(weights="", hard=False, alpha=0.3, temperature=1.0, tokens=0.5)
    student = build(RECOVERS)
    assert open_teacher(student, teacher="self", **settings).model.depth == 2
    like = dict(image_size=224, patch_size=16, width=192, num_heads=3)
    student = build(RECOVERS, **like)
    assert student.depth == 2
    with pytest.raises(InputError, match="must have 2 blocks like the student, and has 12; set it"):
        open_teacher(student, teacher="deit_tiny_patch16_224", **settings | dict(weights="none"))
    for teacher in ("", "self"):  # would be trained for nothing
        with pytest.raises(InputError, match="sit:recovery=True recovers tokens to learn"):
            open_teacher(student, teacher=teacher, **settings | dict(tokens=0.0))


@pytest.mark.slow
def test_200_steps_on_digits_lower_a_methods_own_loss_and_teach_it_what_to_keep():
    # The other methods are in the script's table, see docs/methods.md. Beside `random` it is level.
    learned, _ = learned_methods.follow("cropr")
    before, after = learned["loss"]
    assert after < 0.8 * before
    before, after = learned["top1"]
    assert before < 0.3
    assert after > 0.8
