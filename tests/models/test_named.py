# SPDX-License-Identifier: Apache-2.0
"""timm's names: the table of facts, tags, and what weights look like."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import evit_jax
from evit_jax.errors import InputError
from evit_jax.models import (
    backbones,
    build_model,
    create_model,
    find_model,
    init_params,
    named,
    preprocessing,
)
from evit_jax.models.card import STATISTICS
from evit_jax.weights.files import write_safetensors
from evit_jax.weights.names import tensors_from_params

# One of every kind; the whole table is checked with --slow.
EXAMPLES = (
    "aimv2_large_patch14_224",
    "beit3_base_patch16_224",
    "beit_base_patch16_224",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "eva02_base_patch14_448",
    "eva02_large_patch14_clip_224",
    "eva02_tiny_patch14_224",
    "eva_giant_patch14_224",
    "flexivit_small",
    "lvvit_t",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_giant_patch14_reg4_dinov2",
    "vit_little_patch16_reg4_gap_256",
    "vit_pe_core_tiny_patch16_384",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_small_plus_patch16_dinov3",
    "vit_so150m_patch16_reg4_map_256",
    "vit_so400m_patch14_siglip_224",
)


def shapes(name, **settings):
    model = build_model(name, **settings)
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


def size(params):
    """Of what is learned; running statistics are not."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return sum(leaf.size for path, leaf in flat if path[-1].key not in ("mean", "var"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in EXAMPLES else pytest.mark.slow)
        for name in named.names()
    ],
)
def test_models_have_as_many_parameters_as_timms(name):
    """All blocks of a model are alike, so that one of them is enough to count."""
    entry = named.table()[name]
    params = shapes(name, depth=1)
    others = entry["settings"]["depth"] - 1
    assert size(params) + others * size(params["blocks_0"]) == entry["parameters"]


def test_the_examples_are_of_every_backbone():
    assert set(EXAMPLES) <= set(named.names())
    kinds = {named.table()[name]["backbone"] for name in EXAMPLES}
    assert kinds == set(backbones()) == {entry["backbone"] for entry in named.table().values()}


def test_the_table_is_large_and_readable():
    assert len(named.names()) >= 225
    assert len(named.names(tags=True)) >= 400
    text = Path(named.__file__).with_name("names.json").read_text()
    assert text.isascii()
    assert len(text) < 150_000
    for name, entry in json.loads(text).items():
        assert list(entry["tags"]), name
        for card in entry["tags"].values():
            assert card["statistics"] in STATISTICS, name


def test_every_name_builds_its_model():
    for name in named.names():
        module, settings, card = find_model(name)
        assert settings.keys() <= set(module.__dataclass_fields__), name
        assert card.crop <= 1


def test_a_tag_says_size_classes_and_preprocessing():
    plain = build_model("vit_base_patch16_224")
    assert (plain.num_classes, preprocessing("vit_base_patch16_224").crop) == (1000, 0.9)
    name = "vit_base_patch16_224.augreg_in21k"
    assert build_model(name).num_classes == 21843
    assert build_model(name, num_classes=0).num_classes == 0
    card = preprocessing("vit_base_patch16_224.mae")
    assert card.mean == STATISTICS["imagenet"]["mean"]
    assert build_model("vit_base_patch16_224.mae").num_classes == 0
    name = "vit_small_patch14_reg4_dinov2.lvd142m"
    model = build_model(name, depth=2)
    assert (model.image_size, model.patch_size, model.depth) == ((518, 518), (14, 14), 2)
    assert (model.prefix, model.placed_prefix, model.num_classes) == (5, 0, 0)
    card = preprocessing("eva02_base_patch14_448.mim_in22k_ft_in22k_in1k")
    assert card.squash
    assert card.mean == STATISTICS["clip"]["mean"]


def test_deit_without_a_tag_is_evaluated_as_deit_did_and_with_one_as_timm_does():
    for name, crop in (("deit_small_patch16_224", 0.9), ("deit_base_patch16_384", 1.0)):
        assert preprocessing(name).crop == 0.875
        assert preprocessing(f"{name}.fb_in1k").crop == crop
        assert build_model(name).position_resize == "bicubic"
        assert build_model(f"{name}.fb_in1k").position_resize == "bicubic_antialias"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "vit_small_patch14_reg4_dinov2.lvd142",
            "unknown tag of vit_small_patch14_reg4_dinov2 'lvd142'; did you mean 'lvd142m'?",
        ),
        ("vit_base_patch16_224.dinov2", "known: augreg2_in21k_ft_in1k, augreg_in1k"),
        ("vit_smal_patch14_dinov2.lvd142m", "did you mean 'vit_small_patch14_dinov2'?"),
        ("vit_small_patch16_18x2_224", "needs parallel blocks, which the backbones here do not"),
        ("vit_so400m_patch14_siglip_384", "the last pixels are in no patch"),
        ("vit.in1k", "the backbone 'vit' has no tags"),
    ],
)
def test_wrong_names_and_tags_are_said(name, text):
    with pytest.raises(InputError) as error:
        build_model(name)
    assert text in str(error.value)


def test_names_are_listed_by_pattern():
    found = evit_jax.list_models("*dinov2*")
    assert len(found) >= 8
    assert all("dinov2" in name and "." not in name for name in found)
    tagged = evit_jax.list_models("*dinov2*", tags=True)
    assert "vit_small_patch14_dinov2.lvd142m" in tagged
    assert not set(evit_jax.list_models()) & set(tagged)
    assert "vit_small_patch16_18x2_224" not in evit_jax.list_models()


def test_weights_of_another_family_say_which_they_look_like(tmp_path):
    file = tmp_path / "w.safetensors"
    small = dict(depth=1, image_size=28)
    model, params = create_model("vit_small_patch14_reg4_dinov2", **small)
    write_safetensors(file, tensors_from_params(params, model))
    with pytest.raises(InputError) as error:
        create_model("vit_small_patch16_224", weights=str(file), depth=1)
    text = str(error.value)
    assert "reg_token is not part of the model" in text
    assert text.endswith("look like weights of vit_small_patch14_reg4_dinov2")
    # Of the right family nothing is said of families.
    with pytest.raises(InputError) as error:
        create_model("vit_small_patch14_reg4_dinov2", weights=str(file), num_classes=3, **small)
    assert "look like" not in str(error.value)
    write_safetensors(file, {"layer1.0.conv1.weight": np.ones((4, 4, 1, 1), np.float32)})
    with pytest.raises(InputError, match="do not look like weights of a Vision Transformer"):
        create_model("vit_small_patch16_224", weights=str(file), depth=1)
