# SPDX-License-Identifier: Apache-2.0
"""Files as the authors of models publish them: the same parameters under their names.

What these names and layouts are is read from timm's conversions (vision_transformer.py, eva.py and
beit.py of timm 1.0.31), each of which makes timm's names of what is written here.
"""

import re

import jax
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.weights.names import params_from_tensors, tensors_from_params

SIZES = dict(image_size=32, patch_size=8, width=16, depth=2, num_heads=2, num_classes=0)


def made(name="vit", **settings):
    """A model, random parameters, their shapes and their tensors by timm's names."""
    model = build_model(name, **SIZES | settings)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), shapes)
    return model, params, shapes, tensors_from_params(params, model)


def renamed(tensors, *rules):
    """All names after these substitutions, in order."""
    found = {}
    for name, array in tensors.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        found[name] = array
    return found


CLIP_NAMES = (
    (r"^patch_embed\.proj\.", "conv1."),
    (r"^cls_token$", "class_embedding"),
    (r"^pos_embed$", "positional_embedding"),
    (r"^norm_pre\.", "ln_pre."),
    (r"^norm\.", "ln_post."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)


def clip():
    """OpenAI's CLIP, text tower and all."""
    model, params, shapes, tensors = made(pre_norm=True, num_classes=6)
    params["head"]["bias"] = np.zeros(6, np.float32)
    theirs = renamed(tensors, *CLIP_NAMES)
    theirs["class_embedding"] = theirs["class_embedding"][0, 0]
    theirs["positional_embedding"] = theirs["positional_embedding"][0]
    theirs["proj"] = theirs.pop("head.weight").T
    del theirs["head.bias"]
    theirs = {f"visual.{name}": array for name, array in theirs.items()}
    text = dict(positional_embedding=np.ones((7, 8)), logit_scale=np.ones(()))
    return model, params, shapes, theirs | text | {"transformer.resblocks.0.ln_1.bias": np.ones(8)}


def open_clip():
    """timm's model in OpenCLIP's, with a projection beside it."""
    model, params, shapes, tensors = made(class_token=False, pool="map", num_classes=6)
    params["head"]["bias"] = np.zeros(6, np.float32)
    theirs = {f"visual.trunk.{name}": array for name, array in tensors.items()}
    theirs["visual.head.proj.weight"] = theirs.pop("visual.trunk.head.weight")
    del theirs["visual.trunk.head.bias"]
    return model, params, shapes, theirs | {"text.ln_final.weight": np.ones(8)}


def dinov2():
    """Registers, and positions of the class token that timm adds to it at once."""
    model, params, shapes, tensors = made(
        registers=4, no_embed_class=True, layer_scale=1.0, mlp="swiglu_packed", activation="silu"
    )
    rules = (r"\.mlp\.fc1\.", ".mlp.w12."), (r"\.mlp\.fc2\.", ".mlp.w3.")
    theirs = renamed(tensors, *rules)
    theirs["register_tokens"] = theirs.pop("reg_token")
    place = np.random.default_rng(1).normal(size=(1, 1, 16)).astype(np.float32)
    theirs["pos_embed"] = np.concatenate([place, theirs["pos_embed"]], axis=1)
    params["cls_token"] = theirs["cls_token"] + place
    return model, params, shapes, theirs | dict(mask_token=np.ones((1, 16), np.float32))


def tips():
    """The same, in a model of images and text."""
    model, params, shapes, theirs = dinov2()
    theirs = {f"vision_encoder.{name}": array for name, array in theirs.items()}
    return model, params, shapes, theirs | {"text_encoder.ln_final.scale": np.ones(8)}


def dinov3(qkv_bias="qv"):
    """q, k and v have one bias in which that of k is zero."""
    model, params, shapes, tensors = made(
        "eva", registers=4, layer_scale=1.0, absolute_positions=False, rope="dinov3",
        qkv_bias=qkv_bias, mlp="swiglu", activation="silu", rope_temperature=100.0,
    )  # fmt: skip
    theirs = renamed(
        tensors,
        (r"gamma_([12])$", r"ls\1.gamma"),
        (r"^reg_token$", "storage_tokens"),
        (r"fc1_g", "w1"),
        (r"fc1_x", "w2"),
        (r"fc2", "w3"),
    )
    for i in range(2):
        stem = f"blocks.{i}.attn."
        zeros = np.zeros(16, np.float32)
        parts = [theirs.pop(f"{stem}q_bias", zeros), zeros, theirs.pop(f"{stem}v_bias", zeros)]
        theirs[f"{stem}qkv.bias"] = np.concatenate(parts)
        theirs[f"{stem}qkv.bias_mask"] = np.full(48, np.nan, np.float32)
    extra = {"rope_embed.periods": np.ones(2), "mask_token": np.ones((1, 16))}
    return model, params, shapes, theirs | extra | {"local_cls_norm.weight": np.ones(16)}


def dinov3_without_bias():
    """The distilled models' biases are all zero, and timm's plain names have none."""
    return dinov3(qkv_bias=False)


def eva02():
    """q, k and v apart, norms within, angles kept in buffers."""
    model, params, shapes, tensors = made(
        "eva", rope="cat", qkv_bias="qv", mlp="swiglu", activation="silu", inner_norm=True
    )
    theirs = renamed(
        tensors,
        (r"\.mlp\.norm\.", ".mlp.ffn_ln."),
        (r"\.attn\.norm\.", ".attn.inner_attn_ln."),
        (r"fc1_g", "w1"),
        (r"fc1_x", "w2"),
        (r"fc2", "w3"),
    )
    for i in range(2):
        stem = f"blocks.{i}.attn."
        parts = np.split(theirs.pop(f"{stem}qkv.weight"), 3)
        for part, piece in zip("qkv", parts, strict=True):
            theirs[f"{stem}{part}_proj.weight"] = piece
        theirs[f"{stem}rope.freqs_cos"] = np.ones((16, 8))
    theirs |= {"rope.freqs_cos": np.ones((16, 8)), "rope.freqs_sin": np.ones((16, 8))}
    return model, params, shapes, {f"visual.{name}": array for name, array in theirs.items()}


def perception_encoder():
    """CLIP's names, with map pooling whose q, k and v are one product."""
    model, params, shapes, tensors = made(
        "eva", pre_norm=True, rope="cat", pool="map", layer_scale=1.0, qkv_bias=True, num_classes=6
    )
    params["head"]["bias"] = np.zeros(6, np.float32)
    pooling = {name: tensors.pop(name) for name in list(tensors) if "attn_pool" in name}
    theirs = renamed(tensors, *CLIP_NAMES, (r"\.gamma_([12])$", r".ls_\1.gamma"))
    theirs["class_embedding"] = theirs["class_embedding"][0, 0]
    theirs["positional_embedding"] = theirs["positional_embedding"][0]
    theirs["proj"] = theirs.pop("head.weight").T
    del theirs["head.bias"]
    for leaf in ("weight", "bias"):
        parts = pooling.pop(f"attn_pool.q.{leaf}"), pooling.pop(f"attn_pool.kv.{leaf}")
        theirs[f"attn_pool.attn.in_proj_{leaf}"] = np.concatenate(parts)
    theirs |= renamed(
        pooling,
        (r"attn_pool\.proj\.", "attn_pool.attn.out_proj."),
        (r"attn_pool\.norm\.", "attn_pool.layernorm."),
        (r"attn_pool\.latent", "attn_pool.probe"),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
    )
    return model, params, shapes, {f"visual.{name}": array for name, array in theirs.items()}


def mae():
    """timm's names, with a decoder."""
    model, params, shapes, tensors = made()
    extra = {"mask_token": np.ones((1, 1, 16)), "decoder_pos_embed": np.ones((1, 5, 8))}
    return model, params, shapes, tensors | extra | {"decoder_blocks.0.norm1.bias": np.ones(8)}


def deit3():
    """timm's names, but for LayerScale."""
    model, params, shapes, tensors = made(no_embed_class=True, layer_scale=1e-6)
    return model, params, shapes, renamed(tensors, (r"ls([12])\.gamma$", r"gamma_\1"))


def beit():
    """Indices beside the tables of relative bias."""
    model, params, shapes, tensors = made("beit", layer_scale=0.1)
    indices = {f"blocks.{i}.attn.relative_position_index": np.ones((17, 17)) for i in range(2)}
    return model, params, shapes, tensors | indices


def aimv2():
    """Registers nothing, gates the MLP, and calls the blocks a trunk."""
    model, params, shapes, tensors = made(
        class_token=False, pool="avg", fc_norm=False, norm="rms", embed_norm=True, qkv_bias=False,
        proj_bias=False, mlp="swiglu", activation="silu",
    )  # fmt: skip
    theirs = renamed(
        tensors,
        (r"^patch_embed\.", "preprocessor.patchifier."),
        (r"^pos_embed$", "preprocessor.pos_embed"),
        (r"^norm\.", "trunk.post_trunk_norm."),
        (r"^blocks\.", "trunk.blocks."),
        (r"\.norm([12])\.", r".norm_\1."),
        (r"fc1_g", "fc1"),
        (r"fc1_x", "fc3"),
    )
    return model, params, shapes, theirs


def beit3():
    """Branch A is that of images; two positions are never used."""
    model, params, shapes, tensors = made(inner_norm=True, pool="avg")
    theirs = {}
    for i in range(2):
        for leaf in ("weight", "bias"):
            parts = np.split(tensors.pop(f"blocks.{i}.attn.qkv.{leaf}"), 3)
            for part, piece in zip("qkv", parts, strict=True):
                name = f"beit3.encoder.layers.{i}.self_attn.{part}_proj"
                theirs |= {f"{name}.A.{leaf}": piece, f"{name}.B.{leaf}": 0 * piece}
    positions = tensors.pop("pos_embed")[0]
    positions = np.concatenate([np.ones((2, 16), np.float32), positions])
    theirs["beit3.encoder.embed_positions.A.weight"] = positions
    theirs |= renamed(
        tensors,
        (r"^cls_token$", "beit3.vision_embed.cls_token"),
        (r"^patch_embed\.", "beit3.vision_embed."),
        (r"^blocks\.", "beit3.encoder.layers."),
        (r"\.norm1\.", ".self_attn_layer_norm.A."),
        (r"\.norm2\.", ".final_layer_norm.A."),
        (r"\.attn\.norm\.", ".self_attn.inner_attn_ln.A."),
        (r"\.attn\.proj\.", ".self_attn.out_proj.A."),
        (r"\.mlp\.norm\.", ".ffn.A.ffn_layernorm."),
        (r"\.mlp\.", ".ffn.A."),
    )
    extra = {"beit3.text_embed.weight": np.ones((3, 16))}
    return model, params, shapes, theirs | extra


SOURCES = (
    clip, open_clip, dinov2, tips, dinov3, dinov3_without_bias, eva02, perception_encoder, mae,
    deit3, beit, aimv2, beit3,
)  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
def test_files_of_authors_are_understood(source):
    model, params, shapes, theirs = source()
    found = params_from_tensors(theirs, model, shapes)
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("stacked", [False, True])
def test_the_image_tower_of_siglip_in_npz_is_understood(stacked):
    """big_vision's names under params/img, blocks one by one or in one array, MAPHead_0."""
    model, params, shapes, _ = made(class_token=False, pool="map")
    names = {
        "embedding/kernel": params["patch_embed"]["kernel"].reshape(8, 8, 3, 16),
        "embedding/bias": params["patch_embed"]["bias"],
        "pos_embedding": params["pos_embed"],
        **layer("Transformer/encoder_norm", params["norm"]),
    }
    blocks = []
    for i in range(2):
        block = params[f"blocks_{i}"]
        kernels = np.split(block["attn"]["qkv"]["kernel"], 3, axis=1)
        biases = np.split(block["attn"]["qkv"]["bias"], 3)
        parts = {
            part: dict(kernel=kernel, bias=bias)
            for part, kernel, bias in zip(("query", "key", "value"), kernels, biases, strict=True)
        }
        blocks.append(
            layer("LayerNorm_0", block["norm1"])
            | layer("LayerNorm_1", block["norm2"])
            | layer("MlpBlock_0/Dense_0", block["mlp"]["fc1"])
            | layer("MlpBlock_0/Dense_1", block["mlp"]["fc2"])
            | attention(parts, block["attn"]["proj"])
        )
    for name in blocks[0]:
        if stacked:
            names[f"Transformer/encoderblock/{name}"] = np.stack([b[name] for b in blocks])
        else:
            names |= {f"Transformer/encoderblock_{i}/{name}": b[name] for i, b in enumerate(blocks)}
    pool = params["attn_pool"]
    kernels = np.split(pool["kv"]["kernel"], 2, axis=1)
    biases = np.split(pool["kv"]["bias"], 2)
    parts = {
        part: dict(kernel=kernel, bias=bias)
        for part, kernel, bias in zip(("key", "value"), kernels, biases, strict=True)
    }
    head = (
        {"probe": pool["latent"]}
        | layer("LayerNorm_0", pool["norm"])
        | layer("MlpBlock_0/Dense_0", pool["mlp"]["fc1"])
        | layer("MlpBlock_0/Dense_1", pool["mlp"]["fc2"])
        | attention(parts | dict(query=pool["q"]), pool["proj"])
    )
    names |= {f"MAPHead_0/{name}": array for name, array in head.items()}
    tensors = {f"params/img/{name}": array for name, array in names.items()}
    tensors["params/txt/Encoder_0/encoder_norm/scale"] = np.ones(8)
    tensors["params/t"] = np.ones(1)
    found = params_from_tensors(tensors, model, shapes)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def layer(name, leaves):
    """A layer's leaves by their path."""
    return {f"{name}/{leaf}": array for leaf, array in leaves.items()}


def attention(parts, out):
    """Projections with their heads as an axis of its own."""
    root, found = "MultiHeadDotProductAttention_0/", {}
    for part, leaves in parts.items():
        found[f"{root}{part}/kernel"] = leaves["kernel"].reshape(16, 2, 8)
        found[f"{root}{part}/bias"] = leaves["bias"].reshape(2, 8)
    found[f"{root}out/kernel"] = out["kernel"].reshape(2, 8, 16)
    return found | {f"{root}out/bias": out["bias"]}


def test_a_head_that_the_model_does_not_have_is_left_out():
    model, params, shapes, tensors = made()
    head = {"head.weight": np.ones((5, 16), np.float32), "head.bias": np.ones(5, np.float32)}
    pool = {"attn_pool.latent": np.ones((1, 1, 16), np.float32)}
    found = params_from_tensors(tensors | head | pool, model, shapes)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_the_last_norm_goes_where_the_model_has_it():
    model, params, shapes, tensors = made(pool="avg")
    moved = renamed(tensors, (r"^fc_norm\.", "norm."))
    assert moved.keys() != tensors.keys()
    found = params_from_tensors(moved, model, shapes)
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_shared_table_of_relative_bias_is_every_blocks():
    model, _, shapes, tensors = made("beit")
    ends = ".attn.relative_position_bias_table"
    table = tensors[f"blocks.0{ends}"]
    theirs = {name: array for name, array in tensors.items() if not name.endswith(ends)}
    theirs["rel_pos_bias.relative_position_bias_table"] = table
    found = params_from_tensors(theirs, model, shapes)
    for i in range(2):
        found_table = found[f"blocks_{i}"]["attn"]["relative_position_bias_table"]
        np.testing.assert_array_equal(found_table, table)


def test_a_bias_of_keys_is_not_dropped():
    model, _, shapes, theirs = dinov3()
    theirs["blocks.1.attn.qkv.bias"] = np.ones(48, np.float32)
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.qkv\.bias is not part of the model"):
        params_from_tensors(theirs, model, shapes)


def test_arrays_of_impossible_shapes_are_one_line():
    model, _, shapes, theirs = clip()
    theirs["visual.proj"] = np.ones((), np.float32)
    with pytest.raises(InputError):
        params_from_tensors(theirs, model, shapes)
