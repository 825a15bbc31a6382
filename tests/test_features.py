# SPDX-License-Identifier: Apache-2.0
"""docs/features.md: its code runs, from top to bottom, on a small DINOv2."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "features.md"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the page's code leaves behind."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files = [folder / f"{number}.png" for number in range(3)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (240, 260, 3), np.uint8)).save(file)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    small = code.replace('weights="dinov2_small.safetensors"', "width=48, num_heads=3, depth=4")
    assert small != code
    names = dict(files=files)
    exec(compile(small, str(PAGE), "exec"), names)
    return names


def test_features_are_those_of_the_model_and_similar_to_themselves(ran):
    assert ran["features"].shape == (3, 48)
    np.testing.assert_allclose(np.diag(ran["similar"]), np.ones(3), rtol=1e-5)
    features = ran["model"].apply({"params": ran["params"]}, ran["images"])[0]
    changed = np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))
    same = np.sum(changed * ran["features"], axis=1)
    assert np.all(same > 0.99)  # LayerScale starts at 1e-5: blocks change little as yet


def test_dense_features_are_of_each_patch_in_its_place(ran):
    assert ran["maps"].shape == (3, 16, 16, 48)
    assert ran["reduced"].kept[-1] is None
    assert np.all(np.any(np.asarray(ran["maps"]) != 0, axis=-1))  # nothing was dropped
    assert len(np.unique(np.asarray(ran["maps"][0]).reshape(256, -1), axis=0)) == (
        ran["reduced"].tokens_per_block[-1] - 1
    )


def test_a_layer_is_that_of_the_dense_model_before_anything_is_reduced(ran):
    reduced, params, images = ran["reduced"], ran["params"], ran["images"]
    assert ran["middle"].shape == (3, 256, 48)
    dense = ran["model"].apply({"params": params}, images)[1]["blocks"]
    first = next(i for i, keep in enumerate(reduced.kept) if keep is not None)
    assert first > 0
    got = ran["layer"](reduced, params, images, first - 1)
    np.testing.assert_allclose(got, dense[first - 1][:, 1:], atol=1e-5)
    unlike = np.asarray(ran["layer"](reduced, params, images, first)) != dense[first][:, 1:]
    assert unlike.any()
