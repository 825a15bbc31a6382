# SPDX-License-Identifier: Apache-2.0
"""Which named model weights look like, for the message where they do not fit."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from evit_jax.models import named

Traits = dict[str, Any]


def of_settings(settings: Mapping[str, Any]) -> Traits:
    """What tells models apart and can be seen in their weights."""
    patch = settings.get("patch_size", 16)
    patch = patch if isinstance(patch, int) else patch[0]
    convolutions = "filters" in settings  # before what embeds patches (LV-ViT)
    prefix = dict(class_token=True, distilled=False, registers=0)
    return dict(
        width=settings["width"],
        depth=settings["depth"],
        patch=patch // 2 if convolutions else patch,
        convolutions=convolutions,
        prefix=tuple(settings.get(name, value) for name, value in prefix.items()),
        positions=settings.get("absolute_positions", True),
        layer_scale=settings.get("layer_scale") is not None,
        map_pooling=settings.get("pool") == "map",
        pre_norm=settings.get("pre_norm", False),
        mlp=settings.get("mlp", "plain"),
    )


def of_tensors(tensors: Mapping[str, np.ndarray]) -> Traits | None:
    """The same of weights by timm's names; None where they are of no Vision Transformer."""
    patches = tensors.get("patch_embed.proj.weight")
    blocks = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    if patches is None or patches.ndim != 4 or not blocks:
        return None
    shape = {name: tensors[name].shape for name in tensors if name.startswith("blocks.0.mlp.fc")}
    mlp = "swiglu" if "blocks.0.mlp.fc1_g.weight" in shape else "plain"
    first, second = shape.get("blocks.0.mlp.fc1.weight"), shape.get("blocks.0.mlp.fc2.weight")
    if first and second and first[0] == 2 * second[-1]:
        mlp = "swiglu_packed"
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    return dict(
        width=patches.shape[0],
        depth=1 + max(blocks),
        patch=patches.shape[2],
        convolutions="patch_embed.conv1.weight" in tensors,
        prefix=("cls_token" in tensors, "dist_token" in tensors, registers),
        positions="pos_embed" in tensors,
        layer_scale=any("gamma" in name for name in tensors),
        map_pooling="attn_pool.latent" in tensors,
        pre_norm="norm_pre.weight" in tensors,
        mlp=mlp,
    )


def looks_like(tensors: Mapping[str, np.ndarray], model) -> str:
    """The end of a message: which named models have such weights; "" where that says nothing.

    Args:
      tensors: weights by timm's names.
      model: what they were to be for.
    """
    traits = of_tensors(tensors)
    if traits is None:
        return "; these do not look like weights of a Vision Transformer"
    if traits == of_settings(vars(model)):
        return ""

    def likeness(name: str) -> int:
        other = of_settings(named.table()[name]["settings"])
        return sum(other[key] == value for key, value in traits.items())

    ranked = sorted(named.names(), key=likeness, reverse=True)
    if likeness(ranked[0]) < len(traits) - 2:  # sizes may be others, the family is not
        return ""
    alike = [name for name in ranked if likeness(name) == likeness(ranked[0])]
    return f"; these look like weights of {' or '.join(alike[:3])}"
