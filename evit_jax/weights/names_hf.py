# SPDX-License-Identifier: Apache-2.0
"""Names of Hugging Face transformers -> timm's.

ViT, DeiT, Dinov2, Dinov2WithRegisters, DINOv3ViT, CLIPVision, SiglipVision and Siglip2Vision, alone
or as the image tower of a larger model. Version 5 of transformers has other names in memory than in
its files; both are understood.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from evit_jax.weights.names_original import projection, with_shapes

Tensors = dict[str, np.ndarray]

ROOT = re.compile(
    r"(?:vit|deit|dinov2|dinov2_with_registers|dinov3_vit|siglip|clip|vision_model|model)\.(?=\w+\.)"
)
MARKS = re.compile(
    r"(?:.*\.)?embeddings\.(?:patch_embeddings(?:\.projection)?|patch_embedding)\.weight"
)
UNUSED = re.compile(
    r"(?:.*\.)?(?:mask_token|position_ids)|(?:pooler|rope_embeddings|text_model|text_projection)\..*"
    r"|logit_scale|logit_bias"
)
ATTENTION = r"\.(?:attention\.attention|attention|self_attn)\."
RULES = (
    # SigLIP calls its pooling `head`, as timm its classifier.
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.in_proj_(weight|bias)$", r"attn_pool.qkv.\1"),
    (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.(?:position_embeddings|position_embedding\.weight)$", "pos_embed"),
    (r"^embeddings\.(?:patch_embeddings\.projection|patch_embeddings?)\.", "patch_embed.proj."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(?:layernorm|post_layernorm)\.", "norm."),
    (r"^(?:encoder\.)?layers?\.", "blocks."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.attention\.(?:output\.dense|o_proj)\.|\.self_attn\.out_proj\.", ".attn.proj."),
    (
        r"\.(?:attention\.attention|attention|self_attn)\.([qkv])(?:uery|ey|alue|_proj)\.",
        r".attn.\1.",
    ),
    (r"\.intermediate\.dense\.|\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.output\.dense\.|\.mlp\.weights_out\.|\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1_x."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


def is_hf(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are names of transformers."""
    return any(MARKS.fullmatch(name) for name in tensors)


def from_hf(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """A file's entries by timm's names, q, k and v apart; unknown names stay."""
    renamed: Tensors = {}
    gated = any(".mlp.gate_proj." in name for name in tensors)
    for name, array in tensors.items():
        name = ROOT.sub("", name, count=1)
        if UNUSED.fullmatch(name):
            continue
        if not gated:  # DINOv3's plain MLP
            name = name.replace(".mlp.up_proj.", ".mlp.fc1.")
        if name == "visual_projection.weight":
            renamed |= projection(array)
            continue
        for pattern, replacement in RULES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = array
    weight = renamed.get("patch_embed.proj.weight")
    if weight is not None and weight.ndim == 2:  # Siglip2: (D, high * wide * 3), channels last
        side = math.isqrt(weight.shape[1] // 3)
        weight = weight.reshape(-1, side, side, 3).transpose(0, 3, 1, 2)
        renamed["patch_embed.proj.weight"] = weight
    return with_shapes(renamed)
