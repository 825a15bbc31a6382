# SPDX-License-Identifier: Apache-2.0
"""Names and layouts in the .npz of vision_transformer and big_vision -> timm's.

vision_transformer numbers a block's parts LayerNorm_2, MlpBlock_3 and Attention_1 where big_vision
has _1, _0 and _0. Heads are an axis of their own and kernels are (in, out). big_vision may stack
all blocks of a model in one array, and keeps the image tower of SigLIP under params/img.
"""

import re
from collections.abc import Mapping

import numpy as np

Tensors = dict[str, np.ndarray]

ROOTS = ("opt/target/", "params/img/", "params/", "img/")
STACKED = "Transformer/encoderblock/"
BLOCK = r"Transformer/encoderblock_(\d+)/"
ATTENTION = r"MultiHeadDotProductAttention_[01]/"
NAMES = (
    (r"cls", "cls_token"),
    (r"(?:Transformer/posembed_input/)?pos_embedding", "pos_embed"),
    (r"embedding/(kernel|bias)", r"patch_embed.proj.\1"),
    (r"Transformer/encoder_norm/(scale|bias)", r"norm.\1"),
    (r"head/(kernel|bias)", r"head.\1"),
    (BLOCK + r"LayerNorm_0/(scale|bias)", r"blocks.\1.norm1.\2"),
    (BLOCK + r"LayerNorm_[12]/(scale|bias)", r"blocks.\1.norm2.\2"),
    (BLOCK + r"MlpBlock_[03]/Dense_0/(kernel|bias)", r"blocks.\1.mlp.fc1.\2"),
    (BLOCK + r"MlpBlock_[03]/Dense_1/(kernel|bias)", r"blocks.\1.mlp.fc2.\2"),
    (BLOCK + ATTENTION + r"(query|key|value)/(kernel|bias)", r"blocks.\1.attn.\2.\3"),
    (BLOCK + ATTENTION + r"out/(kernel|bias)", r"blocks.\1.attn.proj.\2"),
    (r"MAPHead_0/probe", "attn_pool.latent"),
    (r"MAPHead_0/LayerNorm_0/(scale|bias)", r"attn_pool.norm.\1"),
    (r"MAPHead_0/MlpBlock_0/Dense_0/(kernel|bias)", r"attn_pool.mlp.fc1.\1"),
    (r"MAPHead_0/MlpBlock_0/Dense_1/(kernel|bias)", r"attn_pool.mlp.fc2.\1"),
    (r"MAPHead_0/" + ATTENTION + r"(query|key|value)/(kernel|bias)", r"attn_pool.\1.\2"),
    (r"MAPHead_0/" + ATTENTION + r"out/(kernel|bias)", r"attn_pool.proj.\1"),
)
LEAVES = {"kernel": "weight", "scale": "weight"}


def is_npz(tensors: Mapping[str, np.ndarray]) -> bool:
    """Whether these are names of one of the two."""
    return any("/" in name for name in tensors) or "pos_embedding" in tensors


def from_npz(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """A file's entries by timm's names, q, k and v apart; unknown names stay."""
    root = next((root for root in ROOTS if f"{root}embedding/kernel" in tensors), "")
    tensors = {name[len(root) :]: a for name, a in tensors.items() if name.startswith(root)}
    renamed: Tensors = {}
    for name, array in unstacked(tensors).items():
        new = next((m.expand(to) for by, to in NAMES if (m := re.fullmatch(by, name))), None)
        if new is None:
            renamed[name] = array
            continue
        stem, _, leaf = new.rpartition(".")
        renamed[f"{stem}.{LEAVES.get(leaf, leaf)}" if stem else leaf] = to_torch(new, array)
    # big_vision adds positions before it prepends the class token, which so has none.
    if "pos_embedding" in tensors and "cls_token" in renamed:
        renamed["pos_embed"] = np.pad(renamed["pos_embed"], ((0, 0), (1, 0), (0, 0)))
    return renamed


def unstacked(tensors: Tensors) -> Tensors:
    """The blocks one by one, where they are stacked along a first axis."""
    apart: Tensors = {}
    for name, array in tensors.items():
        if not name.startswith(STACKED):
            apart[name] = array
            continue
        for number, piece in enumerate(array):
            apart[f"{STACKED[:-1]}_{number}/{name.removeprefix(STACKED)}"] = piece
    return apart


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """One array in PyTorch's layout, by its new name with the old leaf."""
    attention = name.startswith("attn_pool.") or ".attn." in name
    if name.endswith(".kernel"):
        if array.ndim == 4:  # (high, wide, 3, D)
            return array.transpose(3, 2, 0, 1)
        inputs = array.shape[0] * (array.shape[1] if ".proj." in name else 1)
        return array.reshape(inputs, -1).T if attention else array.T
    return array.reshape(-1) if attention and name.endswith(".bias") else array
