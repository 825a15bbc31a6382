# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: PyTorch's timm names and layouts <-> our parameter tree.

The tree itself is the table: every leaf has one timm name and one layout, in both directions.
Everything else (DeiT's and EViT's checkpoints, split q, k, v, vision_transformer's and big_vision's
npz) is first brought to timm's names. All that does not fit is reported at once.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.errors import InputError
from evit_jax.weights.positions import resize_positions, resize_relative_bias

Tensors = dict[str, np.ndarray]

# Names in the .npz of vision_transformer (LayerNorm_2, MlpBlock_3, ...Attention_1) and big_vision.
BLOCK = r"Transformer/encoderblock_(\d+)/"
NPZ_NAMES = (
    (r"cls", "cls_token"),
    (r"(?:Transformer/posembed_input/)?pos_embedding", "pos_embed"),
    (r"embedding/(kernel|bias)", r"patch_embed.proj.\1"),
    (r"Transformer/encoder_norm/(scale|bias)", r"norm.\1"),
    (r"head/(kernel|bias)", r"head.\1"),
    (BLOCK + r"LayerNorm_0/(scale|bias)", r"blocks.\1.norm1.\2"),
    (BLOCK + r"LayerNorm_[12]/(scale|bias)", r"blocks.\1.norm2.\2"),
    (BLOCK + r"MlpBlock_[03]/Dense_0/(kernel|bias)", r"blocks.\1.mlp.fc1.\2"),
    (BLOCK + r"MlpBlock_[03]/Dense_1/(kernel|bias)", r"blocks.\1.mlp.fc2.\2"),
    (
        BLOCK + r"MultiHeadDotProductAttention_[01]/(query|key|value)/(kernel|bias)",
        r"blocks.\1.attn.\2.\3",
    ),
    (BLOCK + r"MultiHeadDotProductAttention_[01]/out/(kernel|bias)", r"blocks.\1.attn.proj.\2"),
)
STEM = {"patch_embed": "patch_embed.proj", "patch_embed_norm": "patch_embed.norm"}
SPLIT = re.compile(r"(.*attn\.)(q|k|v|q_proj|k_proj|v_proj|query|key|value)\.(weight|bias)")

FREQUENCIES = "rope.freqs"  # of learned rotary positions, in timm those of all blocks


def timm_name(path: tuple[str, ...]) -> str:
    """("blocks_3", "attn", "qkv", "kernel") -> "blocks.3.attn.qkv.weight"."""
    *parts, leaf = path
    parts = [STEM.get(p, p.replace("s_", "s.")) for p in parts]
    return ".".join([*parts, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def to_torch(path: tuple[str, ...], array: np.ndarray, model) -> np.ndarray:
    """A leaf in PyTorch's layout: (out, in) for dense layers, (out, 3, high, wide) for patches."""
    if path[-1] != "kernel":
        return array
    if path[0] == "patch_embed":
        return array.reshape(*model.patch_size, 3, -1).transpose(3, 2, 0, 1)
    return array.T


def from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`; an array of unexpected rank is left as it is."""
    if path[-1] != "kernel":
        return array
    if path[0] == "patch_embed" and array.ndim == 4:
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.T


def leaves(params: Mapping) -> dict[tuple[str, ...], jax.Array]:
    """The tree's leaves by path."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path): leaf for path, leaf in flat}


def with_timm_names(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Names and layouts of any supported source -> timm's, with q, k, v fused."""
    renamed = {}
    for name, array in tensors.items():
        name = re.sub(r"^(?:module\.|params/)+", "", name)
        renamed |= (
            from_npz(name, array)
            if "/" in name or name in ("cls", "pos_embedding")
            else {name: array}
        )
    split: dict[str, Tensors] = {}
    for name in [name for name in renamed if SPLIT.fullmatch(name)]:
        prefix, part, leaf = SPLIT.fullmatch(name).groups()
        split.setdefault(f"{prefix}qkv.{leaf}", {})[part[0]] = renamed.pop(name)
    for name, parts in split.items():
        if set(parts) == {"q", "k", "v"}:
            renamed[name] = np.concatenate([parts[part] for part in "qkv"])
        elif name.endswith("bias") and set(parts) == {"q", "v"}:
            prefix = name.removesuffix("qkv.bias")
            renamed |= {f"{prefix}{part}_bias": array for part, array in parts.items()}
        else:
            renamed |= {name.replace("qkv", part): array for part, array in parts.items()}
    if FREQUENCIES in renamed:  # (2, depth, H, C / 2): each block has its own here
        blocks = np.moveaxis(renamed.pop(FREQUENCIES), 1, 0)
        renamed |= {f"blocks.{i}.attn.freqs": part for i, part in enumerate(blocks)}
    return renamed


def from_npz(name: str, array: np.ndarray) -> Tensors:
    """One entry of a vision_transformer or big_vision file; unknown names stay."""
    for pattern, replacement in NPZ_NAMES:
        match = re.fullmatch(pattern, name)
        if not match:
            continue
        new = match.expand(replacement)
        if new == "pos_embed" and name == "pos_embedding":
            # big_vision adds positions before it prepends the class token, which so has none.
            return {new: np.pad(array, ((0, 0), (1, 0), (0, 0)))}
        if new.endswith(".scale"):
            return {new.replace(".scale", ".weight"): array}
        if new.endswith(".kernel"):
            new = new.replace(".kernel", ".weight")
            if array.ndim == 4:  # (high, wide, 3, D)
                return {new: array.transpose(3, 2, 0, 1)}
            inputs = array.shape[0] * (array.shape[1] if ".attn.proj." in new else 1)
            return {new: array.reshape(inputs, -1).T}  # heads are an axis of their own there
        return {new: array.reshape(-1) if ".attn." in new else array}
    return {name: array}


def params_from_tensors(
    tensors: Mapping[str, np.ndarray], model, like: Mapping, *, new_head: bool = False
) -> dict:
    """Tensors of any supported source -> float32 parameters for `model`.

    Position embeddings of another image size are resized as PyTorch does (`positions.py`).

    Args:
      tensors: name -> array.
      model: the Linen module; its grid and prefix say what the positions should be.
      like: its parameters, randomly initialized.
      new_head: keep the heads of `like` where the file has none, or for another number of classes.

    Raises:
      InputError: entries that are missing, unexpected, of another shape or not floating point,
        all of them in one message.
    """
    tensors, fresh = with_timm_names(tensors), leaves(like)
    names = {timm_name(path): path for path in fresh}
    # A file may well have no head, and one of another method has no parameters of this reducer.
    trained = any("reduction" in names[name] for name in tensors if name in names)
    own = {
        name: to_torch(path, np.asarray(fresh[path]), model)
        for name, path in names.items()
        if (new_head and path[0].startswith("head")) or ("reduction" in path and not trained)
    }
    tensors = own | tensors
    problems = [f"{name} is missing" for name in names if name not in tensors]
    problems += [f"{name} is not part of the model" for name in tensors if name not in names]
    params: dict = {}
    for name in [name for name in names if name in tensors]:
        path, array = names[name], tensors[name]
        if not (jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize <= 8):
            problems.append(f"{name} holds {array.dtype}, not floating point numbers")
            continue
        array = np.asarray(from_torch(path, array), np.float32)
        if path == ("pos_embed",) and positions_fit(array, fresh[path], model):
            array = np.asarray(resize_positions({"pos_embed": array}, model)["pos_embed"])
        if path[-1] == "relative_position_bias_table":
            array = resize_relative_bias(array, model.grid)
        if array.shape != fresh[path].shape:
            if path[0].startswith("head") and new_head:
                array = np.asarray(fresh[path])
            else:
                shown = to_torch(path, np.empty(fresh[path].shape, bool), model).shape
                hint = "; new_head=True starts a new one" if path[0].startswith("head") else ""
                problems.append(f"{name} is {tensors[name].shape}, the model's is {shown}{hint}")
                continue
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = jnp.asarray(array)
    if problems:
        raise InputError(f"{len(problems)} entries do not fit: {'; '.join(grouped(problems))}")
    return params


def grouped(problems: list[str]) -> list[str]:
    """What is said of several blocks alike is said once: "blocks.{0,1,2}.norm1.bias is missing"."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for problem in problems:
        block = re.match(r"blocks\.(\d+)\.", problem)
        rest = problem[block.end() :] if block else problem
        groups.setdefault((bool(block), rest), []).append(block[1] if block else "")
    said = []
    for (in_block, rest), blocks in groups.items():
        numbers = blocks[0] if len(blocks) == 1 else "{" + ",".join(blocks) + "}"
        said.append(f"blocks.{numbers}.{rest}" if in_block else rest)
    return said


def positions_fit(table: np.ndarray, fresh: jax.Array, model) -> bool:
    """Whether a table of other length is for a square grid, so that it can be resized."""
    patches = table.shape[1] - model.placed_prefix if table.ndim == 3 else -1
    square = patches > 0 and int(patches**0.5) ** 2 == patches
    return square and table.shape != fresh.shape and table.shape[2] == fresh.shape[2]


def tensors_from_params(params: Mapping, model) -> Tensors:
    """Parameters -> timm names and PyTorch's layouts, float32 and contiguous."""
    tensors = {
        timm_name(path): np.ascontiguousarray(to_torch(path, np.asarray(leaf), model))
        for path, leaf in leaves(params).items()
    }
    blocks = [f"blocks.{i}.attn.freqs" for i in range(model.depth)]
    if blocks[0] in tensors:
        tensors[FREQUENCIES] = np.stack([tensors.pop(name) for name in blocks], axis=1)
    return tensors
