# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from evit_jax.errors import InputError
from evit_jax.models import build_model, create_model, init_params
from evit_jax.weights.names import params_from_tensors, tensors_from_params

SIZES = dict(image_size=32, patch_size=8, width=8, depth=2, num_heads=2, num_classes=3)


def made(**settings):
    """A model and random parameters, none of them zero."""
    model = build_model("vit", **SIZES | settings)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    return model, params, shapes


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("distilled", [False, True])
def test_weights_come_home_exactly(distilled):
    model, params, shapes = made(distilled=distilled)
    tensors = tensors_from_params(params, model)
    same(params_from_tensors(tensors, model, shapes), params)
    assert ("head_dist.weight" in tensors) == distilled


def test_names_and_layouts_are_timms():
    model, params, _ = made()
    tensors = tensors_from_params(params, model)
    assert {name: array.shape for name, array in tensors.items() if "blocks.1" not in name} == {
        "cls_token": (1, 1, 8),
        "pos_embed": (1, 17, 8),
        "patch_embed.proj.weight": (8, 3, 8, 8),
        "patch_embed.proj.bias": (8,),
        "blocks.0.norm1.weight": (8,),
        "blocks.0.norm1.bias": (8,),
        "blocks.0.attn.qkv.weight": (24, 8),
        "blocks.0.attn.qkv.bias": (24,),
        "blocks.0.attn.proj.weight": (8, 8),
        "blocks.0.attn.proj.bias": (8,),
        "blocks.0.norm2.weight": (8,),
        "blocks.0.norm2.bias": (8,),
        "blocks.0.mlp.fc1.weight": (32, 8),
        "blocks.0.mlp.fc1.bias": (32,),
        "blocks.0.mlp.fc2.weight": (8, 32),
        "blocks.0.mlp.fc2.bias": (8,),
        "norm.weight": (8,),
        "norm.bias": (8,),
        "head.weight": (3, 8),
        "head.bias": (3,),
    }
    assert all(array.flags.c_contiguous for array in tensors.values())


def test_split_queries_keys_and_values_and_module_prefixes_are_understood():
    model, params, shapes = made()
    for parts in (("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("query", "key", "value")):
        tensors = {}
        for name, array in tensors_from_params(params, model).items():
            if ".qkv." in name:
                for part, piece in zip(parts, np.split(array, 3), strict=True):
                    tensors["module." + name.replace("qkv", part)] = piece
            else:
                tensors["module." + name] = array
        same(params_from_tensors(tensors, model, shapes), params)


@pytest.mark.parametrize("source", ["vision_transformer", "big_vision"])
def test_npz_names_of_jax_vits_are_understood(source):
    """The same weights as those two projects store them: heads apart, (in, out) kernels."""
    model, params, shapes = made()
    big = source == "big_vision"
    table = params["pos_embed"].copy()
    if big:
        table[:, 0] = 0  # its class token has no position
    params = params | {"pos_embed": table}
    root = "params/" if big else ""
    names = {
        "cls": params["cls_token"],
        "embedding/kernel": params["patch_embed"]["kernel"].reshape(8, 8, 3, 8),
        "embedding/bias": params["patch_embed"]["bias"],
        "Transformer/encoder_norm/scale": params["norm"]["scale"],
        "Transformer/encoder_norm/bias": params["norm"]["bias"],
        "head/kernel": params["head"]["kernel"],
        "head/bias": params["head"]["bias"],
    }
    names |= {"pos_embedding": table[:, 1:]} if big else {
        "Transformer/posembed_input/pos_embedding": table
    }  # fmt: skip
    for i in range(2):
        block, at = params[f"blocks_{i}"], f"Transformer/encoderblock_{i}/"
        attention = at + f"MultiHeadDotProductAttention_{0 if big else 1}/"
        for part, kernel, bias in zip(
            ("query", "key", "value"),
            np.split(block["attn"]["qkv"]["kernel"], 3, axis=1),
            np.split(block["attn"]["qkv"]["bias"], 3),
            strict=True,
        ):
            names[attention + part + "/kernel"] = kernel.reshape(8, 2, 4)
            names[attention + part + "/bias"] = bias.reshape(2, 4)
        names[attention + "out/kernel"] = block["attn"]["proj"]["kernel"].reshape(2, 4, 8)
        names[attention + "out/bias"] = block["attn"]["proj"]["bias"]
        for ours, theirs in (("norm1", 0), ("norm2", 1 if big else 2)):
            for leaf in ("scale", "bias"):
                names[at + f"LayerNorm_{theirs}/{leaf}"] = block[ours][leaf]
        for ours, theirs in (("fc1", 0), ("fc2", 1)):
            for leaf in ("kernel", "bias"):
                path = at + f"MlpBlock_{0 if big else 3}/Dense_{theirs}/{leaf}"
                names[path] = block["mlp"][ours][leaf]
    tensors = {root + name: array for name, array in names.items()}
    same(params_from_tensors(tensors, model, shapes), params)


def test_everything_that_does_not_fit_is_reported_at_once():
    model, params, shapes = made()
    tensors = tensors_from_params(params, model)
    tensors["norm.weight"] = tensors["norm.weight"][:-1]
    tensors["head.bias"] = tensors["head.bias"].astype(np.int32)
    tensors["extra.weight"] = tensors.pop("cls_token")
    with pytest.raises(InputError) as error:
        params_from_tensors(tensors, model, shapes)
    for text in (
        "4 entries do not fit",
        "cls_token is missing",
        "extra.weight is not part of the model",
        "norm.weight is (7,), the model's is (8,)",
        "head.bias holds int32",
    ):
        assert text in str(error.value)


def test_what_is_wrong_in_many_blocks_is_said_once():
    model, params, shapes = made()
    tensors = tensors_from_params(params, model)
    tensors = {k: v for k, v in tensors.items() if "fc1.bias" not in k and "1.norm1.bias" not in k}
    with pytest.raises(InputError) as error:
        params_from_tensors(tensors, model, shapes)
    expected = "blocks.{0,1}.mlp.fc1.bias is missing; blocks.1.norm1.bias is missing"
    assert f"3 entries do not fit: {expected}" == str(error.value)


def test_another_number_of_classes_only_when_asked_for(tmp_path):
    model, params, _ = made()
    file = str(tmp_path / "w.safetensors")
    save_file(tensors_from_params(params, model), file)
    with pytest.raises(InputError, match=r"head.weight is \(3, 8\).*new_head=True"):
        create_model("vit", weights=file, **SIZES | dict(num_classes=7))
    _, fresh = create_model("vit", weights=file, new_head=True, **SIZES | dict(num_classes=7))
    assert fresh["head"]["kernel"].shape == (8, 7)
    same(fresh["blocks_1"], params["blocks_1"])

    headless = {k: v for k, v in tensors_from_params(params, model).items() if "head" not in k}
    save_file(headless, file)
    with pytest.raises(InputError, match=r"head\.weight is missing"):
        create_model("vit", weights=file, **SIZES)
    _, fresh = create_model("vit", weights=file, new_head=True, **SIZES)
    assert fresh["head"]["kernel"].shape == (8, 3)
    same(fresh["norm"], params["norm"])


def test_files_of_another_image_size_get_resized_positions(tmp_path):
    model, params, _ = made()
    file = str(tmp_path / "w.safetensors")
    save_file(tensors_from_params(params, model), file)
    wide, loaded = create_model("vit", weights=file, **SIZES | dict(image_size=(48, 32)))
    assert loaded["pos_embed"].shape == (1, 1 + 24, 8)
    assert wide.grid == (6, 4)
    same(loaded["pos_embed"][:, 0], params["pos_embed"][:, 0])


def test_models_of_different_keep_rates_share_one_set_of_parameters(tmp_path):
    model, params, _ = made()
    file = str(tmp_path / "w.safetensors")
    save_file(tensors_from_params(params, model), file)
    _, one = create_model("vit", weights=file, keep_rate=0.5, **SIZES)
    _, other = create_model("vit", weights=file, reducer="tome:r=2", **SIZES)
    same(one, other)


def test_errors_name_the_file(tmp_path):
    with pytest.raises(InputError, match=r"none.safetensors"):
        create_model("vit", weights=str(tmp_path / "none.safetensors"), **SIZES)
