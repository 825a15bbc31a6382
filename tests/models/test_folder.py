# SPDX-License-Identifier: Apache-2.0
"""Folders of Hugging Face transformers against its own answers, and folders of timm's hub.

`python -m tests.compare_transformers` compares more of them, where there is transformers.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, create_model, find_model, preprocessing
from evit_jax.weights.files import read_tensors, write_safetensors
from evit_jax.weights.names import tensors_from_params
from tests.compare_transformers import NATIVE, OTHER, draw_images, ours

FOLDERS = Path(__file__).parents[1] / "fixtures" / "transformers"
CASES = sorted(path.name for path in FOLDERS.iterdir() if path.is_dir())
TOLERANCE = 2e-5  # of the largest value


@pytest.fixture
def copied(tmp_path):
    """A function that copies a folder, with changes to its config.json."""

    def copy(case, **changes):
        folder = shutil.copytree(FOLDERS / case, tmp_path / case)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return copy


@pytest.mark.parametrize("size", ["native", "other"])
@pytest.mark.parametrize("case", CASES)
def test_hidden_states_pooled_features_and_logits_are_those_of_transformers(case, size):
    images = draw_images(NATIVE if size == "native" else OTHER)
    found = ours(str(FOLDERS / case), images)
    expected = read_tensors(FOLDERS / case / "expected.safetensors")
    names = {name.removeprefix(f"{size}.") for name in expected if name.startswith(size)}
    assert names & {"logits", "pooled"}
    for name in names:
        values = expected[f"{size}.{name}"]
        limit = TOLERANCE * np.abs(values).max()
        np.testing.assert_allclose(found[name], values, rtol=0, atol=limit, err_msg=name)


def test_a_folder_is_a_model_whose_settings_may_be_changed():
    folder = str(FOLDERS / "dinov2_registers")
    model = build_model(folder, image_size=32, keep_rate=0.5, layers=(0,))
    assert (model.prefix, model.registers, model.num_classes) == (5, 4, 0)
    assert model.tokens_per_block == (5 + 32 + 1,) * 2


def test_a_folders_weights_go_into_a_model_of_the_same_sizes_and_no_other():
    folder = str(FOLDERS / "vit_head")
    sizes = dict(image_size=24, patch_size=4, width=24, depth=2, num_classes=5, mlp_ratio=5 / 3)
    _, params = create_model("vit", weights=folder, num_heads=3, **sizes)
    assert params["head"]["kernel"].shape == (24, 5)
    with pytest.raises(InputError, match="has num_heads 3, the model 4; create_model"):
        create_model("vit", weights=folder, num_heads=4, **sizes)


def test_the_image_processor_is_the_card(copied):
    folder = copied("clip_projection")
    assert preprocessing(str(folder)).mean == (0.5, 0.5, 0.5)
    processor = dict(
        do_center_crop=True,
        crop_size=dict(height=224, width=224),
        size=dict(shortest_edge=256),
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.4, 0.5, 0.6],
        resample=2,
    )
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(processor))
    card = preprocessing(str(folder))
    assert (card.mean, card.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert (card.crop, card.interpolation, card.squash) == (0.875, "bilinear", False)
    file.write_text(json.dumps(dict(size=dict(height=24, width=24), resample=3)))
    card = preprocessing(str(folder))
    assert (card.crop, card.interpolation, card.squash) == (1.0, "bicubic", True)


@pytest.mark.parametrize(
    ("case", "changes", "text"),
    [
        ("vit_head", dict(model_type="vitt"), "did you mean 'vit'?"),
        ("vit_head", dict(model_type="bert"), "unknown model_type 'bert'"),
        ("vit_head", dict(hidden_act="relu"), "unknown hidden_act 'relu'"),
        ("vit_head", dict(hidden_size="wide"), "is not as transformers writes it"),
        ("dinov3_gated", dict(mlp_bias=False), "only some of its layers"),
        ("vit_head", dict(intermediate_size=48), "blocks.{0,1}.mlp.fc1.weight is (40, 24)"),
    ],
)
def test_what_a_config_asks_in_vain_is_said(copied, case, changes, text):
    with pytest.raises(InputError) as error:
        create_model(str(copied(case, **changes)))
    assert text in str(error.value)


def test_dinov2s_classifier_is_left_out_with_a_warning(copied):
    kind = "Dinov2WithRegistersForImageClassification"
    with pytest.warns(UserWarning, match="the classifier reads class token and mean"):
        model, _ = create_model(str(copied("dinov2_registers", architectures=[kind])))
    assert model.num_classes == 0


def test_a_folder_with_missing_parts_says_which(copied):
    folder = copied("siglip2")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(InputError, match=r"model-00002-of-\d+.safetensors does not exist"):
        create_model(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"a": "../../other.safetensors"})))
    with pytest.raises(InputError, match=r"siglip2/other.safetensors does not exist"):
        create_model(str(folder))
    index.write_text("{}")
    with pytest.raises(InputError, match="is damaged"):
        create_model(str(folder))
    index.unlink()
    with pytest.raises(InputError, match=r"as a folder has no model.safetensors"):
        create_model(str(folder))


def test_a_folder_of_timms_hub_goes_by_its_architecture(tmp_path):
    sizes = dict(width=32, depth=1, num_heads=2, image_size=28)
    name = "vit_small_patch14_dinov2"
    model, params = create_model(name, **sizes)
    write_safetensors(tmp_path / "model.safetensors", tensors_from_params(params, model))
    config = dict(architecture=name, num_classes=0, pretrained_cfg=dict(tag="lvd142m"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    again, same = create_model(str(tmp_path), **sizes)
    np.testing.assert_array_equal(same["cls_token"], params["cls_token"])
    assert again == model
    assert find_model(str(tmp_path)) == find_model(f"{name}.lvd142m")
    (tmp_path / "config.json").write_text(json.dumps(config | dict(architecture="resnet50")))
    with pytest.raises(InputError, match="unknown architecture 'resnet50'"):
        create_model(str(tmp_path))
