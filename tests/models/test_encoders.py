# SPDX-License-Identifier: Apache-2.0
"""Families of timm's models against timm's own answers, in files of tests/scripts/timm_fixtures.py.

Every name of timm's is compared by `python -m tests.compare_timm --all`, where there is timm.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from evit_jax.models import create_model
from evit_jax.weights.files import read_tensors
from evit_jax.weights.names import tensors_from_params

FILES = Path(__file__).parents[1] / "fixtures" / "encoders"
SIZES = dict(width=32, num_heads=2, depth=2, patch_size=4, num_classes=5)
PIXELS = dict(native=(16, 16), other=(12, 20))  # the files are for the first
TOLERANCE = 2e-5  # of the largest value
NAMES = sorted(path.stem for path in FILES.glob("*.npz"))


def load(name, size):
    """The model of this name at one of the sizes, and its parameters."""
    file = str(FILES / f"{name}.safetensors")
    return create_model(name, weights=file, image_size=PIXELS[size], **SIZES)


@pytest.mark.parametrize("size", PIXELS)
@pytest.mark.parametrize("name", NAMES)
def test_features_logits_and_patches_are_timms(name, size):
    model, params = load(name, size)
    height, width = PIXELS[size]
    images = np.load(FILES / "images.npy")[:, :height, :width]

    @jax.jit
    def answers(params, images):
        logits, out = model.apply({"params": params}, images)
        pooled, _ = model.clone(num_classes=0).apply({"params": params}, images)
        return dict(logits=logits, pooled=pooled, patches=out["dense"])

    with np.load(FILES / f"{name}.npz") as file:
        expected = {key: file[f"{size}_{key}"] for key in ("logits", "pooled", "patches")}
    for key, value in answers(params, images).items():
        np.testing.assert_allclose(
            value, expected[key], rtol=0, atol=TOLERANCE * np.abs(expected[key]).max(), err_msg=key
        )


@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_timms_file(name):
    model, params = load(name, "native")
    saved = tensors_from_params(params, model)
    file = read_tensors(str(FILES / f"{name}.safetensors"))
    assert saved.keys() == file.keys()
    for key, array in saved.items():
        np.testing.assert_array_equal(array, file[key], err_msg=key)
