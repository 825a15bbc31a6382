# SPDX-License-Identifier: Apache-2.0
"""LV-ViT against its authors' code, in files of tests/scripts/lvvit_fixtures.py, and its parts."""

import functools
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, create_model, init_params, preprocessing
from evit_jax.models.vit import swapped
from evit_jax.plan.flops import macs
from evit_jax.training.losses import cross_entropy
from evit_jax.training.steps import replaced
from evit_jax.weights.files import read_tensors, write_safetensors
from evit_jax.weights.names import tensors_from_params

FILES = Path(__file__).parents[1] / "fixtures" / "lvvit"
WEIGHTS = FILES / "weights.pth.tar"
SIZES = dict(
    image_size=32, patch_size=8, width=16, depth=4, num_heads=2, num_classes=5, filters=6,
    branch_scale=0.5,
)  # fmt: skip
STATISTICS = ("mean", "var")


@cache
def expected():
    with np.load(FILES / "expected.npz") as file:
        return dict(file)


def group(prefix):
    """The fixture's arrays below a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in expected().items() if k.startswith(prefix)}


def load(**settings):
    return create_model("lvvit", weights=str(WEIGHTS), **SIZES | settings)


def small(**settings):
    """A small model with parameters of its own."""
    model = build_model("lvvit", **SIZES | settings)
    return model, jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


def learned(params):
    """The leaves that are learned, by path: all but running statistics."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {path: leaf for path, leaf in flat if path[-1].key not in STATISTICS}


def close(value, reference, tolerance):
    """As vectors, relative to the length of the reference."""
    return np.linalg.norm(value - reference) <= tolerance * np.linalg.norm(reference)


@cache
def training():
    """A training step with the fixture's box: ((loss, (logits, out)), gradients) and the model."""
    model, params = load()
    images, maps = (jnp.asarray(expected()[name]) for name in ("image", "label_maps"))
    swap = jnp.broadcast_to(expected()["swap"], (4, 16))

    def loss_of(params):
        logits, out = model.apply({"params": params}, images, train=True, swap=swap)
        share = jnp.mean(swap)
        partners = maps.reshape(2, 2, *maps.shape[1:])[:, ::-1].reshape(maps.shape)
        whole = (1 - share) * maps[:, 0] + share * partners[:, 0]
        dense = cross_entropy(out["patch_logits"], swapped(maps[:, 1:], swap))
        return jnp.mean(cross_entropy(logits, whole)) + jnp.mean(dense), (logits, out)

    return model, swap, *jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)


def test_evaluation_agrees_with_the_authors_code():
    model, params = load()
    logits, out = jax.jit(model.apply)({"params": params}, expected()["image"])
    np.testing.assert_allclose(logits, expected()["logits"], rtol=0, atol=1e-5)
    most = out["logits_cls"] + 0.5 * out["patch_logits"].max(axis=1)
    np.testing.assert_allclose(logits, most, rtol=1e-6)
    assert "statistics" not in out


def test_a_training_step_with_swapped_patches_agrees():
    _, swap, (loss, (logits, out)), _ = training()
    assert abs(float(loss) - expected()["loss"]) <= 2e-6
    np.testing.assert_allclose(logits, expected()["train_cls"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(logits, out["logits_cls"])
    back = swapped(out["patch_logits"], swap)
    np.testing.assert_allclose(back, expected()["train_aux"], rtol=0, atol=1e-5)


def test_every_gradient_agrees_and_running_statistics_have_none():
    model, _, _, grads = training()
    tensors, reference = tensors_from_params(grads, model), group("grad/")
    statistics = tensors.keys() - reference.keys()
    assert all("running" in name and not tensors[name].any() for name in statistics)
    assert {name for name in tensors if "running" in name} == statistics
    for name, value in reference.items():
        assert close(tensors[name], value, 1e-5), name


def test_running_statistics_move_as_pytorchs_do():
    model, _, (_, (_, out)), _ = training()
    after = tensors_from_params(out["statistics"], model)
    assert after.keys() == group("after/").keys()
    for name, value in group("after/").items():
        np.testing.assert_allclose(after[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def test_evit_keeps_the_same_tokens_and_gives_the_same_logits_and_gradients():
    model, params = load(keep_rate=0.7)
    assert [block for block, keep in enumerate(model.keep) if keep] == [1, 2, 3]

    def loss_of(params):
        logits, out = model.apply({"params": params}, expected()["image"])
        return jnp.sum(out["logits_cls"] ** 2), (logits, out)

    (_, (logits, out)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    for block in (1, 2, 3):
        order = np.argsort(-out["cls_attention"][block][:, 1:], axis=1, kind="stable")
        kept = expected()[f"evit/kept_{block}"]
        np.testing.assert_array_equal(order[:, : kept.shape[1]], kept)
    np.testing.assert_allclose(logits, expected()["evit/logits"], rtol=0, atol=1e-5)
    grads = tensors_from_params(grads, model)
    for name, value in group("evit/grad/").items():
        assert close(grads[name], value, 1e-5), name


def test_files_of_the_authors_come_out_as_they_went_in(tmp_path):
    model, params = load()
    saved, file = tensors_from_params(params, model), read_tensors(WEIGHTS)
    assert saved.keys() == {name for name in file if "num_batches_tracked" not in name}
    for name, array in saved.items():
        np.testing.assert_array_equal(array, file[name].astype(np.float32), err_msg=name)
    write_safetensors(tmp_path / "w.safetensors", saved)
    again = create_model("lvvit", weights=str(tmp_path / "w.safetensors"), **SIZES)[1]
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_positions_and_heads_of_a_file_follow_the_model():
    model, params = load(image_size=(48, 32), num_classes=0)
    assert params["pos_embed"].shape == (1, 25, 16)
    assert not any(name.startswith("head") for name in params)
    features, out = jax.jit(model.apply)({"params": params}, jnp.ones((1, 48, 32, 3)))
    assert features.shape == (1, 16)
    assert "patch_logits" not in out


@pytest.mark.parametrize(
    ("name", "parameters", "cost"),
    [
        ("lvvit_t", 8_534_720, 2.9e9),
        ("lvvit_s", 26_151_824, 6.55e9),
        ("lvvit_m", 55_830_544, 12.7e9),
        ("lvvit_l", 150_473_552, 157e9),
    ],
)
def test_published_sizes_and_costs(name, parameters, cost):
    model = build_model(name)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert sum(leaf.size for leaf in learned(params).values()) == parameters
    assert macs(model) == pytest.approx(cost, rel=0.02)
    assert preprocessing(name).crop == (0.9 if name in ("lvvit_t", "lvvit_s") else 1.0)


def test_evit_costs_what_the_paper_says():
    model = build_model("lvvit_s")
    for rate, cost in ((0.7, 4.71e9), (0.5, 3.88e9)):
        reduced = model.clone(keep=model.plan(keep_rate=rate))
        assert [block for block, keep in enumerate(reduced.keep) if keep] == [4, 8, 12]
        assert macs(reduced) == pytest.approx(cost, rel=0.01)
    model = build_model("lvvit_m", keep_rate=0.7)
    assert [block for block, keep in enumerate(model.keep) if keep] == [5, 10, 15]


def test_the_batch_decides_in_training_and_the_running_statistics_do_otherwise():
    model, params = small(depth=1, num_classes=0)
    images = 3 + 2 * jax.random.normal(jax.random.key(1), (4, 32, 32, 3))

    @jax.jit
    def step(params):
        features, out = model.apply({"params": params}, images, train=True)
        return replaced(params, out["statistics"]), features

    state, trained = step(params)
    for _ in range(60):
        state, features = step(state)
    np.testing.assert_array_equal(features, trained)
    # After many steps the running ones are the batch's, but for the unbiased variance.
    evaluate = jax.jit(lambda params: model.apply({"params": params}, images)[0])
    np.testing.assert_allclose(evaluate(state), trained, atol=0.02)
    assert np.abs(evaluate(params) - trained).max() > 0.05


def test_swapping_needs_pairs_and_takes_patches_from_the_partner():
    x = jnp.arange(24.0).reshape(4, 3, 2)
    swap = jnp.array([[True, False, False]] * 4)
    got = swapped(x, swap)
    np.testing.assert_array_equal(got[:, 0], x[jnp.array([1, 0, 3, 2]), 0])
    np.testing.assert_array_equal(got[:, 1:], x[:, 1:])
    with pytest.raises(InputError, match="a batch of 3"):
        swapped(x[:3], swap[:3])


def test_swapped_patches_of_any_vit_are_those_of_mixed_images():
    """Patches of ViT are embedded one by one, so mixing pixels is the same there."""
    model = build_model("vit", image_size=16, patch_size=4, width=16, depth=1, num_heads=2)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    swap = jnp.broadcast_to(jnp.arange(16) < 8, (2, 16))
    mixed = jnp.concatenate([images[::-1, :8], images[:, 8:]], axis=1)
    apply = jax.jit(model.apply)
    got, _ = apply({"params": params}, images, swap=swap)
    np.testing.assert_allclose(got, apply({"params": params}, mixed)[0], atol=1e-6)


def test_odd_patches_and_no_filters_are_refused():
    for changes, text in ((dict(patch_size=1), "must be even"), (dict(filters=0), "from 1 up")):
        with pytest.raises(InputError, match=text):
            build_model("lvvit", **SIZES | changes)


def test_half_precision_changes_little_and_recomputing_nothing():
    model, params = small(depth=2, keep_rate=0.7)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

    @functools.partial(jax.jit, static_argnums=0)
    def both(model, params, images):
        (_, logits), grads = jax.value_and_grad(
            lambda p: ((y := model.apply({"params": p}, images, train=True)[0]).sum(), y),
            has_aux=True,
        )(params)
        return logits, grads, model.apply({"params": params}, images)[0]

    exact = both(model, params, images)
    for leaf, other in zip(
        *map(jax.tree.leaves, (exact, both(model.clone(remat=True), params, images))), strict=True
    ):
        np.testing.assert_allclose(other, leaf, rtol=1e-5, atol=1e-5)
    half = both(model.clone(dtype=jnp.bfloat16), params, images)
    # bfloat16 has 8 bits of mantissa, so a relative error of 2^-8 per operation is its nature.
    for i in (0, 2):
        assert half[i].dtype == jnp.float32
        np.testing.assert_allclose(half[i], exact[i], atol=0.03)


def test_empty_slots_have_no_say():
    model, params = small(depth=1, reducer="ats", tokens=6, layers=(0,))
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    logits, out = jax.jit(model.apply)({"params": params}, images)
    there = np.asarray(out["size"])[:, 1:, None] > 0
    most = np.where(there, out["patch_logits"], -np.inf).max(axis=1)
    np.testing.assert_allclose(logits, out["logits_cls"] + 0.5 * most, rtol=1e-5, atol=1e-6)
