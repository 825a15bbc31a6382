# SPDX-License-Identifier: Apache-2.0
"""Names in the files that the authors of models publish -> timm's.

DeiT, DeiT-III, MAE, DINO and BEiT name their parameters as timm does, but for a few extra ones.
Others differ: CLIP (OpenAI, OpenCLIP) and the Perception Encoder, DINOv2, DINOv3, EVA-02, AIMv2,
BEiT-3 and TIPSv2. What a name means does not depend on the model it is for.
"""

import re
from collections.abc import Mapping

import numpy as np

Tensors = dict[str, np.ndarray]

# The image tower of a larger model, by what marks it.
TOWERS = ("visual.trunk.", "visual.", "vision_encoder.", "image_encoder.", "backbone.", "encoder.")
MARKS = ("patch_embed.proj.weight", "conv1.weight", "class_embedding", "pos_embed")

RULES = (
    # CLIP and the Perception Encoder
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^attn_pool\.attn\.in_proj_(weight|bias)$", r"attn_pool.qkv.\1"),
    (r"^attn_pool\.attn\.out_proj\.", "attn_pool.proj."),
    (r"^attn_pool\.layernorm\.", "attn_pool.norm."),
    (r"^attn_pool\.probe$", "attn_pool.latent"),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.ls_([12])\.gamma$", r".ls\1.gamma"),
    (r"\.attn\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    # EVA-02, DINOv2 and DINOv3
    (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
    (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
    (r"^storage_tokens$", "reg_token"),
)
AIMV2 = (
    (r"^preprocessor\.patchifier\.", "patch_embed."),
    (r"^preprocessor\.pos_embed$", "pos_embed"),
    (r"^trunk\.post_trunk_norm\.", "norm."),
    (r"^trunk\.", ""),
    (r"\.norm_([12])\.", r".norm\1."),
    (r"\.mlp\.fc1\.", ".mlp.fc1_g."),
    (r"\.mlp\.fc3\.", ".mlp.fc1_x."),
)
BEIT3 = (
    (r"^beit3\.vision_embed\.cls_token$", "cls_token"),
    (r"^beit3\.vision_embed\.", "patch_embed."),
    (r"^beit3\.encoder\.embed_positions\.A\.weight$", "pos_embed"),
    (r"^beit3\.encoder\.layers\.", "blocks."),
    (r"\.self_attn_layer_norm\.A\.", ".norm1."),
    (r"\.final_layer_norm\.A\.", ".norm2."),
    (r"\.self_attn\.inner_attn_ln\.A\.", ".attn.norm."),
    (r"\.self_attn\.out_proj\.A\.", ".attn.proj."),
    (r"\.self_attn\.([qkv]_proj)\.A\.", r".attn.\1."),
    (r"\.ffn\.A\.ffn_layernorm\.", ".mlp.norm."),
    (r"\.ffn\.A\.", ".mlp."),
)
# Of pretraining, of other towers, or computed anew.
UNUSED = re.compile(
    r"(?:.*\.)?(?:mask_token|relative_position_index|periods|bias_mask|k_bias|num_batches_tracked)"
    r"|(?:.*\.)?rope\.(?!freqs$).*|freqs_(?:cos|sin)|(?:.*\.)?freqs_(?:cos|sin)"
    r"|(?:decoder|decoder_\w+|lm_head|pre_logits|local_cls_norm|projectors|text_model|dino_head)\b.*"
    r"|beit3\..*\.B\..*|beit3\.text_embed\..*"
    r"|logit_scale|logit_bias"
)


def from_original(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """A file's entries by timm's names; unknown names stay, what is known as unused goes."""
    rules = RULES
    if "preprocessor.patchifier.proj.weight" in tensors:
        rules = AIMV2
    elif any(name.startswith("beit3.") for name in tensors):
        rules = BEIT3
    else:
        tensors = tower(tensors)
    renamed: Tensors = {}
    for name, array in tensors.items():
        if UNUSED.fullmatch(name):
            continue
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    if rules is BEIT3 and "pos_embed" in renamed:
        renamed["pos_embed"] = renamed["pos_embed"][None, 2:]  # the first two are never looked up
    if "proj" in renamed:  # CLIP's projection, (D, out)
        renamed |= projection(renamed.pop("proj").T)
    return with_shapes(renamed)


def tower(tensors: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """The image tower alone, where the file holds more than that."""
    for prefix in TOWERS:
        if any(prefix + mark in tensors for mark in MARKS):
            found = {n[len(prefix) :]: a for n, a in tensors.items() if n.startswith(prefix)}
            if prefix == "visual.trunk." and "visual.head.proj.weight" in tensors:
                found |= projection(tensors["visual.head.proj.weight"])
            return found
    return tensors


def projection(weight: np.ndarray) -> Tensors:
    """A projection (out, D) without a bias, as a head."""
    return {"head.weight": weight, "head.bias": np.zeros(weight.shape[:1], np.float32)}


def with_shapes(tensors: Tensors) -> Tensors:
    """Tokens and positions as (1, N, D), and DINOv2's class token with its position where there are
    registers, which have none: timm then gives positions to patches only."""
    for name in ("cls_token", "pos_embed"):
        if name in tensors and tensors[name].ndim < 3:
            tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
    if "register_tokens" in tensors:
        tensors["reg_token"] = tensors.pop("register_tokens")
        if {"cls_token", "pos_embed"} <= tensors.keys():
            positions = tensors["pos_embed"]
            tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
            tensors["pos_embed"] = positions[:, 1:]
    return tensors
