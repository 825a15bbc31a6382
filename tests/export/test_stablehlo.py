# SPDX-License-Identifier: Apache-2.0
"""Models as StableHLO: any batch, several platforms, each with its own form."""

import jax
import numpy as np
import pytest
from jax import export

from evit_jax.errors import InputError
from evit_jax.export import stablehlo
from evit_jax.models import build_model, init_params

SIZES = dict(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=3)


@pytest.fixture(scope="module")
def reduced():
    model = build_model("vit", **SIZES, keep_rate=0.6, layers=(0,))
    params = init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), params)
    return lambda images: model.apply({"params": params}, images)[0]


@pytest.fixture(scope="module")
def path(reduced, tmp_path_factory):
    pytest.importorskip("flatbuffers")
    path = tmp_path_factory.mktemp("stablehlo") / "model.stablehlo"
    stablehlo.write(path, reduced, (16, 16))
    return path


@pytest.mark.parametrize("batch", [1, 5])
def test_one_file_takes_any_batch(reduced, path, batch):
    images = np.random.default_rng(1).normal(size=(batch, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(stablehlo.load(path)(images), reduced(images), atol=1e-5)


def test_each_platform_has_its_own_form_in_the_file(path):
    exported = export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    text = exported.mlir_module()
    assert "stablehlo.convolution" in text  # a TPU's patch embedding
    assert "stablehlo.case" in text  # and the choice


def test_a_fixed_batch_refuses_another(reduced, tmp_path):
    pytest.importorskip("flatbuffers")
    stablehlo.write(tmp_path / "two", reduced, (16, 16), batch=2, platforms=["cpu"])
    call = stablehlo.load(tmp_path / "two")
    assert call(np.zeros((2, 16, 16, 3), np.float32)).shape == (2, 3)
    with pytest.raises(ValueError, match="shape"):
        call(np.zeros((3, 16, 16, 3), np.float32))


def test_what_is_no_such_file_and_no_such_platform_is_refused(reduced, tmp_path):
    pytest.importorskip("flatbuffers")
    (tmp_path / "text").write_text("no model")
    with pytest.raises(InputError, match="is no exported model"):
        stablehlo.load(tmp_path / "text")
    with pytest.raises(InputError, match="unknown platform 'gpu'"):
        stablehlo.write(tmp_path / "x", reduced, (16, 16), platforms=["gpu"])
