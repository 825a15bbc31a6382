# SPDX-License-Identifier: Apache-2.0
"""Models as ONNX, run by onnxruntime."""

import jax
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.export import onnx, quantize
from evit_jax.models import build_model

pytest.importorskip("jax2onnx")
pytest.importorskip("onnxruntime")

SIZES = dict(image_size=32, patch_size=8, width=16, depth=3, num_heads=2, num_classes=3)
PLANS = {
    "dense": dict(),
    "evit": dict(keep_rate=0.7, layers=(1,)),
    "ward": dict(keep_rate=0.7, layers=(0, 1)),
    "tome": dict(keep_rate=0.7, layers=(0, 1)),
    "diffrate": dict(tokens=(None, (10, 8), None)),
    "cropr:fusion=True": dict(keep_rate=0.7),
}


@pytest.fixture(scope="module", params=PLANS)
def exported(request, tmp_path_factory):
    """(model, its function of images and its parameters, the file)."""
    name, plan = request.param, PLANS[request.param]
    model = build_model("vit", **SIZES, reducer="evit" if name == "dense" else name, **plan)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), shapes)

    def logits(images, params=params):
        return model.apply(params, images)[0]

    path = tmp_path_factory.mktemp("onnx") / f"{name}.onnx"
    onnx.write(path, logits, (32, 32))
    return model, logits, params, path


def test_one_file_takes_any_batch_and_agrees_with_flax(exported):
    _, logits, _, path = exported
    call = onnx.load(path)
    for batch in (1, 5):
        images = np.random.default_rng(1).normal(size=(batch, 32, 32, 3)).astype(np.float32)
        np.testing.assert_allclose(call(images), logits(images), atol=1e-4)


def test_tokens_in_the_graph_are_those_of_the_plan(exported):
    model, _, _, path = exported
    found = onnx.tokens_after_blocks(path, model.width, model.hidden)
    # The last block computes what logits read alone, the class token.
    assert found == [*model.tokens_per_block[:-1], 1]


def test_linear_layers_in_8_bits_are_those_of_our_own_code(exported, tmp_path):
    _, logits, params, path = exported
    count = onnx.quantize_file(path, tmp_path / "int8.onnx")
    small = quantize.quantized(params)
    assert count >= len([x for x in jax.tree.leaves(small, is_leaf=weight) if weight(x)])
    function = quantize.with_int8_products(lambda params, images: logits(images, params))
    images = np.random.default_rng(1).normal(size=(5, 32, 32, 3)).astype(np.float32)
    got, wanted = onnx.load(tmp_path / "int8.onnx")(images), function(small, images)
    # A value halfway between two numbers may be rounded to either.
    np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())
    assert np.abs(got - logits(images)).max() > 1e-3
    assert (tmp_path / "int8.onnx").stat().st_size < path.stat().st_size


def weight(value):
    return isinstance(value, quantize.Weight)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "text").write_text("no model")
    with pytest.raises(InputError, match="onnxruntime cannot load"):
        onnx.load(tmp_path / "text")
