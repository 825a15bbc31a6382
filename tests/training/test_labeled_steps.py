# SPDX-License-Identifier: Apache-2.0
"""Training steps with label maps, MixToken and DeiT-III's loss, against sums by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.training import losses, steps
from evit_jax.training.labeling import TokenLabels
from evit_jax.training.mix import Mix, blend
from tests.training.test_steps import CARD, assert_close, first_step, make_batch

SIZES = dict(image_size=16, patch_size=4, width=16, num_heads=2, num_classes=3)
MODEL = build_model("vit", depth=2, patch_head=True, **SIZES)
REDUCED = build_model(
    "vit", depth=3, patch_head=True, keep_rate=0.5, layers=(0, 1), **SIZES
)  # the second block may fuse or keep what the first one fused
MIX = Mix(token=1.0)
LABELS = TokenLabels(weight=0.5)


def labeled(size=8):
    """A batch with maps of 6x5 cells."""
    rng = np.random.default_rng(1)
    corner = rng.uniform(0, 0.5, (size, 2))
    return make_batch(size=size) | dict(
        label_ids=np.tile(np.arange(2, dtype=np.int16)[None, :, None, None], (size, 1, 6, 5)),
        label_logits=rng.normal(1, 2, (size, 2, 6, 5)).astype(np.float16),
        label_box=np.concatenate([corner, corner + 0.4], axis=1).astype(np.float32),
    )


def start(model):
    """A state whose heads are no longer near zero."""
    params = dict(init_params(model, jax.random.key(0)))
    for name in {"head", "head_aux"} & params.keys():
        kernel = jax.random.normal(jax.random.key(1), params[name]["kernel"].shape)
        params[name] = params[name] | dict(kernel=kernel)
    return dict(step=jnp.int32(0), params=params, ema=params, metrics=steps.metrics.zeros())


@functools.partial(jax.jit, static_argnames=("model", "train"))
def apply(model, params, image, swap=None, train=True):
    return model.apply(dict(params=params), CARD.normalize(image), train=train, swap=swap)


def step_of(model, batch, **changes):
    return first_step(model, state=start(model), batch=batch, labels=LABELS, **changes)


def drawn_box(model, seed=0):
    """The swapped patches (P,) of the first step."""
    key, _ = jax.random.split(jax.random.fold_in(jax.random.key(seed), 0))
    return np.asarray(MIX.random_tokens(key, model.grid))


def partners(array):
    return np.asarray(array)[np.arange(len(array)) ^ 1]


@pytest.mark.parametrize("maps", [True, False], ids=["maps", "classes"])
def test_with_nothing_dropped_the_loss_is_the_papers_codes(maps):
    """There the patches' predictions are swapped back instead of their targets forth."""
    batch = labeled() if maps else make_batch()
    seed = next(s for s in range(9) if 2 < drawn_box(MODEL, s).sum() < 14)
    _, figures = step_of(MODEL, batch, mix=MIX, seed=seed)
    box = drawn_box(MODEL, seed)
    swap = jnp.broadcast_to(jnp.asarray(box), (8, 16))
    logits, out = apply(MODEL, start(MODEL)["params"], batch["image"], swap)
    if maps:
        targets = LABELS.targets(batch, 3, (4, 4), 0.1)
    else:
        truth = losses.smooth_labels(batch["label"], 3, 0.1)
        targets = dict(label=truth, patches=jnp.repeat(truth[:, None], 16, axis=1))
    patch_logits = np.asarray(out["patch_logits"])
    back = np.where(box[None, :, None], partners(patch_logits), patch_logits)
    dense = losses.cross_entropy(back, targets["patches"]).mean()
    share = 1 - box.mean()
    mixed = share * targets["label"] + (1 - share) * partners(targets["label"])
    expected = losses.cross_entropy(logits, mixed).mean() + 0.5 * dense
    assert float(figures["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_with_a_head_for_patches_says_what_its_class_head_says():
    # A student in training has nothing of the patches in its logits, so a twin learns nothing.
    soft = dict(distillation=losses.Distillation(hard=False, alpha=1.0), teacher=MODEL)
    _, figures = first_step(MODEL, state=start(MODEL), batch=make_batch(), **soft)
    assert abs(float(figures["loss"])) < 1e-6


def test_under_evit_only_patches_on_their_own_learn():
    batch = labeled()
    _, figures = step_of(REDUCED, batch)
    logits, out = apply(REDUCED, start(REDUCED)["params"], batch["image"])
    targets = LABELS.targets(batch, 3, (4, 4), 0.1)
    dense = []
    for image, owner in enumerate(np.asarray(out["owner"][-1])):
        alone = [p for p in range(16) if (owner == owner[p]).sum() == 1]
        assert 1 <= len(alone) < 8
        kept = jnp.stack([out["patch_logits"][image, owner[p]] for p in alone])
        dense.append(losses.cross_entropy(kept, targets["patches"][image, jnp.array(alone)]).mean())
    expected = losses.cross_entropy(logits, targets["label"]) + 0.5 * jnp.stack(dense)
    assert float(figures["loss"]) == pytest.approx(float(expected.mean()), rel=1e-5)


def test_micro_batches_give_the_gradients_of_the_whole_one():
    whole, once = step_of(REDUCED, labeled(), mix=MIX)
    grads, figures = step_of(REDUCED, labeled(), mix=MIX, accumulate=2)
    assert_close(grads, whole, 1e-5)  # recovered as a difference of parameters, see `first_step`
    assert float(figures["loss"]) == pytest.approx(float(once["loss"]), rel=1e-6)


def test_lvvit_learns_with_maps_and_has_new_statistics():
    model = build_model("lvvit", depth=3, filters=8, keep_rate=0.5, layers=(1,), **SIZES)
    descent = optax.sgd(0.05)
    recipe = steps.Recipe(
        preprocessing=CARD, optimizer=descent, mix=MIX, labels=LABELS, label_smoothing=0.1
    )
    state = steps.init_state(init_params(model, jax.random.key(0)), descent, ema=False)
    before = state["params"]["patch_embed"]["bn1"]
    step = jax.jit(lambda state, batch: steps.train_step(
        state, batch, {}, models=(model,), recipe=recipe))  # fmt: skip
    seen = []
    for _ in range(12):
        state, figures = step(state, labeled())
        seen.append(float(figures["loss"]))
    assert np.mean(seen[-3:]) < np.mean(seen[:3])
    after = state["params"]["patch_embed"]["bn1"]
    for name in ("mean", "var", "scale"):
        assert (np.asarray(before[name]) != np.asarray(after[name])).any()


@pytest.mark.slow
def test_a_teacher_sees_whole_images_and_its_answers_are_mixed_by_area():
    soft = losses.Distillation(hard=False, alpha=1.0)
    plain = build_model("vit", depth=2, **SIZES)
    state, batch = start(plain), make_batch()
    seed = next(s for s in range(9) if 2 < drawn_box(plain, s).sum() < 14)
    _, figures = first_step(
        plain, state=state, batch=batch, mix=MIX, seed=seed, distillation=soft, teacher=plain
    )
    box = drawn_box(plain, seed)
    taught = jax.nn.softmax(apply(plain, state["params"], batch["image"], train=False)[0])
    swap = jnp.broadcast_to(jnp.asarray(box), (8, 16))
    logits, _ = apply(plain, state["params"], batch["image"], swap)
    expected = losses.divergence(logits, blend(taught, 1 - box.mean())).mean()
    # The difference of two numbers near 1.1, of which float32 rounds each by 1e-7.
    assert float(figures["loss"]) == pytest.approx(float(expected), abs=5e-7)


def test_a_binary_cross_entropy_takes_the_place_of_the_images():
    plain = build_model("vit", depth=2, **SIZES)
    batch = make_batch()
    _, figures = first_step(plain, state=start(plain), batch=batch, loss="bce", label_smoothing=0.0)
    logits, _ = apply(plain, start(plain)["params"], batch["image"])
    expected = losses.binary_cross_entropy(logits, jax.nn.one_hot(batch["label"], 3)).mean()
    assert float(figures["loss"]) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(InputError, match=r"set label_smoothing to 0, got 0\.1"):
        steps.Recipe(CARD, optax.sgd(1.0), Mix(), loss="bce", label_smoothing=0.1)
    with pytest.raises(InputError, match="did you mean 'bce'"):
        steps.Recipe(CARD, optax.sgd(1.0), Mix(), loss="bc")


def test_batch_shapes_are_those_of_a_labeled_batch():
    shapes = steps.batch_shapes((16, 16), 8, label_map=(2, 6, 5))
    found = {name: (array.shape, array.dtype) for name, array in shapes.items()}
    assert found == {name: (array.shape, array.dtype) for name, array in labeled().items()}
