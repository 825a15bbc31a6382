# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from evit_jax.models import build_model, init_params, vit
from evit_jax.training import steps

SIZES = dict(image_size=24, patch_size=6, width=16, depth=4, num_heads=2, num_classes=5)
IMAGES = np.random.default_rng(0).normal(size=(12, 24, 24, 3)).astype(np.float32)


def tiny(**settings):
    """create_model("vit") with its parameters drawn in one compiled program."""
    model = build_model("vit", **SIZES | settings)
    return model, jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


@pytest.fixture
def one_cpu_device(monkeypatch):
    """As where a user has a CPU alone; the tests' own has four devices."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(keep_rate=0.5, distilled=True),
        dict(keep_rates=(1, 0.7, 1, 0.6)),
        dict(reducer="tome:r=3"),
    ],
    ids=["dense", "distilled", "reducing last", "tome"],
)
def test_the_logits_are_those_of_the_last_blocks_tokens(settings):
    model, params = tiny(**settings)
    _, out = jax.jit(model.apply)({"params": params}, IMAGES)
    last = out["blocks"][-1]
    assert last.shape[1] == model.tokens_per_block[-1]
    tokens = last[:, : model.prefix]
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    expected = normed * params["norm"]["scale"][None, None] + params["norm"]["bias"][None, None]
    np.testing.assert_allclose(out["features"], expected, atol=1e-5)


def test_logits_alone_cost_less_than_all_there_is():
    model, params = tiny(keep_rate=0.5)

    def flops(function):
        return jax.jit(function).lower(params, IMAGES).compile().cost_analysis()["flops"]

    logits = flops(lambda params, images: model.apply({"params": params}, images)[0])
    everything = flops(lambda params, images: model.apply({"params": params}, images))
    mlp = 2 * len(IMAGES) * model.tokens_per_block[-1] * 2 * model.width * model.hidden
    assert everything - logits > 0.8 * mlp  # the last block's MLP, but for the class token


def test_a_cpu_works_on_parts_that_its_caches_hold(one_cpu_device):
    model = build_model("deit_small_patch16_224")
    assert [model.part(n) for n in (1, 8, 16, 32, 50)] == [1, 8, 8, 8, 5]
    assert model.part(31) == 31  # no divisor is near what fits
    assert [model.part(n, train=True) for n in (8, 16, 50)] == [4, 4, 50]
    assert build_model("deit_base_patch16_384").part(128, train=True) == 2
    assert build_model("deit_base_patch16_224").part(32) == 4
    assert steps.micro_batches(model, 16) == 4
    digits = build_model("vit", **SIZES)
    assert (digits.part(256), steps.micro_batches(digits, 256)) == (256, 1)


def test_other_devices_work_on_whole_batches(monkeypatch):
    model = build_model("deit_small_patch16_224")
    assert model.part(32) == 32  # several devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert (model.part(32), steps.micro_batches(model, 32)) == (32, 1)


def test_parts_give_what_the_whole_batch_gives(one_cpu_device, monkeypatch):
    model, params = tiny(keep_rate=0.5, distilled=True)
    whole = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, IMAGES)
    monkeypatch.setattr(vit, "CPU_CACHE", 4 * 4 * (model.prefix + model.patches) * model.hidden)
    assert model.part(len(IMAGES)) == 4
    program = jax.jit(model.apply).lower({"params": params}, IMAGES)
    assert "while" in program.as_text()
    parts = program.compile()({"params": params}, IMAGES)
    assert jax.tree.structure(parts) == jax.tree.structure(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), parts, whole)


def test_without_jit_and_where_values_are_captured_the_batch_stays_whole(
    one_cpu_device, monkeypatch
):
    monkeypatch.setattr(vit, "CPU_CACHE", 1)
    model, params = tiny()
    monkeypatch.setattr(jax.lax, "map", None)  # would compile anew in every call
    logits, _ = model.apply({"params": params}, IMAGES)
    capture = dict(capture_intermediates=True, mutable=["intermediates"])

    def apply(params, images):
        return model.apply({"params": params}, images, **capture)

    (same, _), captured = jax.jit(apply)(params, IMAGES)
    np.testing.assert_allclose(same, logits, atol=1e-5)
    assert len(captured["intermediates"]["blocks_0"]["__call__"][0][0].x) == len(IMAGES)


def test_init_and_training_see_the_whole_batch(one_cpu_device, monkeypatch):
    monkeypatch.setattr(vit, "CPU_CACHE", 1)
    model, params = tiny(keep_rate=0.5)
    drawn = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    assert jax.tree.map(np.shape, drawn) == jax.tree.map(np.shape, params)
    trained = jax.jit(lambda p, x: model.apply({"params": p}, x, train=True)[0])
    assert "while" not in trained.lower(params, IMAGES).as_text()
