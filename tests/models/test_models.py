# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evit_jax
from evit_jax.errors import InputError
from evit_jax.models import build_model, create_model, init_params, preprocessing
from evit_jax.models.card import IMAGENET
from evit_jax.plan.flops import macs
from evit_jax.training import report

SMALL = dict(image_size=32, patch_size=8, width=32, depth=4, num_heads=4, num_classes=10)

PARAMETERS = {
    "vit_tiny_patch16_224": 5_717_416,
    "vit_small_patch16_224": 22_050_664,
    "vit_base_patch16_224": 86_567_656,
    "vit_base_patch16_384": 86_859_496,
    "deit_tiny_patch16_224": 5_717_416,
    "deit_small_patch16_224": 22_050_664,
    "deit_base_patch16_224": 86_567_656,
    "deit_base_patch16_384": 86_859_496,
    "deit_tiny_distilled_patch16_224": 5_910_800,
    "deit_small_distilled_patch16_224": 22_436_432,
    "deit_base_distilled_patch16_224": 87_338_192,
    "deit_base_distilled_patch16_384": 87_630_032,
}


def create(**settings):
    """create_model("vit") with its parameters drawn in one compiled program."""
    model = build_model("vit", **SMALL | settings)
    return model, jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


def apply(model, params, images):
    return jax.jit(lambda params, images: model.apply({"params": params}, images))(params, images)


def shapes(model):
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_exact(name):
    params = shapes(build_model(name))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_reducing_adds_no_parameters_and_shares_them_between_rates():
    model, params = create(keep_rate=0.5)
    again, same = create(keep_rate=0.9, reducer="random")
    jax.tree.map(np.testing.assert_array_equal, params, same)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    for variant in (model, again, model.clone(keep=model.plan(keep_rate=0.7))):
        logits, _ = apply(variant, params, images)
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("size", ["small", "small_distilled"])
@pytest.mark.parametrize("reducer", ["evit", "evit:fuse=False", "random", "tome"])
def test_a_budget_of_macs_is_never_exceeded_and_more_never_means_fewer_tokens(size, reducer):
    settings = dict(name=f"deit_{size}_patch16_224", reducer=reducer)
    before = (0,) * 12
    for budget in (1.5e9, 2.0e9, 3.0e9, 3.0e9 + 4e6, 4.5e9):
        model = build_model(**settings, macs=budget)
        assert 0.99 * budget < macs(model) <= budget
        assert all(map(int.__ge__, model.tokens_per_block, before))
        before = model.tokens_per_block
        rounded = build_model(**settings, macs=budget, multiple_of=8)
        assert macs(rounded) <= budget
        assert all(count % 8 == 0 for count in rounded.tokens_per_block if count < 197)
        # What a plan costs is enough for it, and one less is not.
        assert model.plan(macs=macs(model)) == model.keep
        assert macs(model.clone(keep=model.plan(macs=macs(model) - 1))) < macs(model)
    assert build_model(**settings, macs=4.7e9).keep == (None,) * 12
    paper = model.plan(keep_rate=0.7)
    assert model.plan(macs=macs(model.clone(keep=paper))) == paper


def test_a_budget_has_layers_a_warm_up_and_nothing_beside_it():
    model = build_model("deit_small_patch16_224", macs=3.5e9, layers=(2, 5))
    assert [block for block, count in enumerate(model.keep) if count] == [2, 5]
    costs = [macs(model.clone(keep=model.plan(macs=3e9, remaining=left))) for left in (0, 0.5, 1)]
    assert costs[0] <= 3e9 < costs[1] < costs[2] == macs(model.clone(keep=()))
    for other in (dict(keep_rate=0.7), dict(keep_rates=(0.9,) * 12), dict(tokens=50)):
        with pytest.raises(InputError, match=r"give macs \(a budget\), or keep rates or tokens"):
            model.plan(macs=3e9, **other)
    with pytest.raises(InputError, match="has a schedule of its own"):
        build_model("deit_small_patch16_224", macs=3e9, reducer="tome:r=13")


def test_out_holds_owner_attention_and_tokens_of_every_block():
    model, params = create(keep_rate=0.5)
    assert model.tokens_per_block == (17, 10, 7, 5)
    logits, out = apply(model, params, jnp.ones((2, 32, 32, 3)))
    assert logits.shape == (2, 10)
    assert [owner.shape for owner in out["owner"]] == [(2, 16)] * 3
    assert [block.shape for block in out["blocks"]] == [(2, n, 32) for n in (17, 10, 7, 5)]
    assert [row.shape for row in out["cls_attention"]] == [(2, n) for n in (17, 17, 10, 7)]
    assert out["size"].shape == (2, 5)
    np.testing.assert_array_equal(out["size"].sum(axis=1), 17)


def test_images_need_not_be_square():
    model, params = create(keep_rate=0.7, image_size=(32, 64), patch_size=(8, 16))
    assert (model.grid, model.patches) == ((4, 4), 16)
    logits, _ = apply(model, params, jnp.ones((1, 32, 64, 3)))
    assert logits.shape == (1, 10)


def test_a_patch_is_a_rectangle_of_its_image():
    model, params = create()
    image = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))
    kernel = params["patch_embed"]["kernel"].reshape(8, 8, 3, 32)
    convolved = jax.lax.conv_general_dilated(
        image, kernel, (8, 8), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = convolved.reshape(1, 16, 32) + params["patch_embed"]["bias"][None, None]
    _, state = model.apply(
        {"params": params}, image, capture_intermediates=lambda _, name: name == "embed"
    )
    tokens = state["intermediates"]["embed"][0]
    embedded = tokens.x[:, 1:] - params["pos_embed"][:, 1:]
    np.testing.assert_allclose(embedded, expected, rtol=1e-5, atol=1e-5)


def test_the_distillation_token_is_never_reduced_and_has_its_own_head():
    model, params = create(keep_rate=0.5, distilled=True)
    assert model.tokens_per_block == (18, 11, 8, 6)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    logits, out = apply(model, params, images)
    np.testing.assert_allclose(logits, (out["logits_cls"] + out["logits_dist"]) / 2, rtol=1e-6)
    for name, token in (("head", 0), ("head_dist", 1)):
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        expected = out["features"][:, token] @ kernel + bias[None]
        got = out["logits_cls" if name == "head" else "logits_dist"]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(out["logits_cls"], out["logits_dist"])
    assert (np.asarray(out["size"][:, :2]) == 1).all()


def test_training_drops_paths_and_evaluation_does_not():
    model, params = create(drop_path_rate=0.5, dropout_rate=0.1)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

    @functools.partial(jax.jit, static_argnames="train")
    def logits(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, images, train=train, rngs=rngs)[0]

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    np.testing.assert_array_equal(logits(0, True), logits(0, True))
    assert not np.allclose(logits(0, True), logits(1, True))
    assert not np.allclose(logits(0, True), logits(0, False))


def test_parts_of_a_batch_draw_what_the_whole_one_draws():
    model, params = create(keep_rate=0.7, drop_path_rate=0.5, dropout_rate=0.1, reducer="random")
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))

    @jax.jit
    def logits(images, index):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply({"params": params}, images, train=True, index=index, rngs=rngs)[0]

    whole = logits(images, None)
    parts = [logits(images[i : i + 2], jnp.arange(i, i + 2)) for i in (0, 2)]
    np.testing.assert_allclose(jnp.concatenate(parts), whole, rtol=1e-5, atol=1e-6)
    assert not np.allclose(logits(images[2:], None), whole[2:])


def test_rematerialisation_changes_memory_and_nothing_else():
    model, params = create(keep_rate=0.7, drop_path_rate=0.5)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))

    def logits(params, model):
        rngs = {"dropout": jax.random.key(0)}
        return model.apply({"params": params}, images, train=True, rngs=rngs)[0]

    def residuals(model):
        """Bytes kept for the backward pass. (XLA for CPU undoes it, so ask JAX.)"""
        kept = jax.eval_shape(lambda params: jax.vjp(lambda p: logits(p, model), params)[1], params)
        return report.size_of(kept)

    def gradient(model):
        return jax.jit(jax.grad(lambda params: logits(params, model).sum()))(params)

    recomputing = model.clone(remat=True)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        gradient(recomputing),
        gradient(model),
    )
    assert residuals(recomputing) < 0.5 * residuals(model)


def test_bfloat16_computes_in_it_and_answers_in_float32():
    model, params = create(keep_rate=0.7, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    logits, out = apply(model, params, images)
    assert logits.dtype == jnp.float32
    assert {block.dtype for block in out["blocks"]} == {jnp.dtype("bfloat16")}
    exact, _ = apply(model.clone(dtype=jnp.float32), params, images)
    # bfloat16 has 8 bits of mantissa, so a relative error of 2^-8 per operation is its nature.
    np.testing.assert_allclose(logits, exact, atol=0.03)


def test_initial_weights_are_deits():
    _, params = create(width=256)
    block = params["blocks_0"]
    for kernel in (block["attn"]["qkv"], block["mlp"]["fc1"], params["head"]):
        assert float(kernel["kernel"].std()) == pytest.approx(0.02, rel=0.06)
        assert (kernel["bias"] == 0).all()
    assert float(params["pos_embed"].std()) == pytest.approx(0.02, rel=0.06)
    bound = (8 * 8 * 3) ** -0.5  # PyTorch's default for the patch convolution
    patch = params["patch_embed"]["kernel"]
    assert float(jnp.abs(patch).max()) <= bound
    assert float(patch.std()) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_named_models_carry_their_preprocessing():
    deit = preprocessing("deit_small_patch16_224")
    assert dataclasses.asdict(deit) == IMAGENET | dict(
        crop=0.875, interpolation="bicubic", squash=False
    )
    assert preprocessing("vit_small_patch16_224").mean == (0.5, 0.5, 0.5)


def test_normalizing_maps_the_mean_to_zero():
    card = preprocessing("deit_small_patch16_224")
    images = jnp.asarray(np.round(np.array(card.mean) * 255), jnp.uint8)[None, None]
    np.testing.assert_allclose(card.normalize(images), 0, atol=0.01)
    white = card.normalize(jnp.full((1, 1, 3), 255, jnp.uint8))
    np.testing.assert_allclose(white[0, 0], (1 - np.array(card.mean)) / card.std, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(name="deit_smal_patch16_224"), "did you mean 'deit_small_patch16_224'?"),
        (dict(name="vit", image_sise=32), "did you mean 'image_size'?"),
        (dict(name="vit", image_size=8), "image height 8 is smaller than a patch of 16"),
        (dict(name="vit", image_size=(224, 230)), "image width 230 is not a multiple"),
        (dict(name="vit", image_size=230), "the nearest that is: 224"),
        (dict(name="vit", image_size=0), "positive whole number"),
        (dict(name="vit", keep_rate=70), "did you mean 0.7?"),
        (dict(name="vit", reducer="evitt"), "did you mean 'evit'?"),
        (dict(name="vit", num_heads=0), "num_heads must be a whole number from 1 up"),
        (dict(name="vit", dropout_rate=1), "must be in [0, 1)"),
        (dict(name="vit", keep_rates=0.7), "got one number"),
        (dict(name="vit", num_heads=7), "does not divide into 7 heads"),
        (dict(name="vit", dtype="float8"), "unknown dtype 'float8'"),
    ],
)
def test_bad_settings_say_what_to_do(settings, text):
    with pytest.raises(InputError) as error:
        build_model(**settings)
    assert text in str(error.value)


def test_another_image_size_at_apply_is_one_clear_error():
    model, params = create()
    with pytest.raises(InputError, match=r"takes images of shape \(B, 32, 32, 3\)"):
        apply(model, params, jnp.ones((1, 40, 40, 3)))


def test_a_plan_of_another_depth_is_refused():
    model, params = create()
    with pytest.raises(InputError, match="keep needs one entry per block, 4, got 1"):
        apply(model.clone(keep=(5,)), params, jnp.ones((1, 32, 32, 3)))


def test_training_without_dropout_needs_no_random_key():
    model, params = create(keep_rate=0.5)
    images = jnp.ones((1, 32, 32, 3))
    logits, _ = jax.jit(lambda p: model.apply({"params": p}, images, train=True))(params)
    np.testing.assert_array_equal(logits, apply(model, params, images)[0])


def test_the_package_offers_create_model():
    assert evit_jax.create_model is create_model
