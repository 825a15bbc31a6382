# SPDX-License-Identifier: Apache-2.0
"""Weights in and out: PyTorch's timm names and layouts <-> our parameter tree.

The tree itself is the table: every leaf has one timm name and one layout, in both directions.
Everything else is first brought to timm's names: the files of a model's authors
(names_original.py), of Hugging Face transformers (names_hf.py), vision_transformer and big_vision
(names_npz.py). All that does not fit is reported at once.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.errors import InputError
from evit_jax.weights.names_hf import from_hf, is_hf
from evit_jax.weights.names_npz import from_npz, is_npz
from evit_jax.weights.names_original import from_original
from evit_jax.weights.positions import resize_positions, resize_relative_bias

Tensors = dict[str, np.ndarray]

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
STEM = {"patch_embed": "patch_embed.proj", "patch_embed_norm": "patch_embed.norm"}
HEADS = {"head_aux": "aux_head"}  # of patches, LV-ViT's
LEAVES = dict(kernel="weight", scale="weight", mean="running_mean", var="running_var")
SPLIT = re.compile(
    r"(.*attn\.|attn_pool\.)(q|k|v|q_proj|k_proj|v_proj|query|key|value)\.(weight|bias)"
)

PATCHES = "patch_embed", "kernel"  # of ViT's, which is a dense layer of whole patches
RECOVERY = "recovery"  # in blocks, see `Reducer.recovers`
FREQUENCIES = "rope.freqs"  # of learned rotary positions, in timm those of all blocks


def timm_name(path: tuple[str, ...]) -> str:
    """("blocks_3", "attn", "qkv", "kernel") -> "blocks.3.attn.qkv.weight"."""
    *parts, leaf = path
    if len(parts) == 1:
        parts = [(STEM | HEADS).get(parts[0], parts[0])]
    parts = [re.sub(r"^(blocks|mlp)_(?=\d)", r"\1.", part) for part in parts]
    return ".".join([*parts, LEAVES.get(leaf, leaf)])


def to_torch(path: tuple[str, ...], array: np.ndarray, model) -> np.ndarray:
    """A leaf in PyTorch's layout: (out, in) for dense layers, (out, in, high, wide) for windows."""
    if path[-1] != "kernel":
        return array
    if path == PATCHES:
        array = array.reshape(*model.patch_size, 3, -1)
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch`; an array of unexpected rank is left as it is."""
    if path[-1] != "kernel":
        return array
    if array.ndim != 4:
        return array.T
    array = array.transpose(2, 3, 1, 0)
    return array.reshape(-1, array.shape[-1]) if path == PATCHES else array


def of_reducer(path: Iterable[str]) -> bool:
    """Whether a leaf with this path, or the parts of its timm name, is a reducer's own."""
    return not {"reduction", RECOVERY}.isdisjoint(path)


def of_recovery(name: str) -> bool:
    """Whether a timm name is of a network that recovers patches, which training alone has."""
    return RECOVERY in name.split(".")


def leaves(params: Mapping) -> dict[tuple[str, ...], jax.Array]:
    """The tree's leaves by path."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(key.key for key in path): leaf for path, leaf in flat}


def with_timm_names(tensors: Mapping[str, np.ndarray]) -> Tensors:
    """Names and layouts of any supported source -> timm's, with q, k, v fused.

    Raises:
      InputError: an array that should be taken apart or joined has too few dimensions.
    """
    renamed = {re.sub(r"^(?:module\.|_orig_mod\.)+", "", n): a for n, a in tensors.items()}
    read = from_npz if is_npz(renamed) else from_hf if is_hf(renamed) else from_original
    try:
        return fused(read(renamed))
    except (ValueError, IndexError) as error:
        raise InputError(f"its arrays have shapes that no such model has ({error})") from None


def fused(tensors: Tensors) -> Tensors:
    """One product for q, k and v in blocks, one for k and v in map pooling, as timm has them."""
    whole = {name: array for name, array in tensors.items() if not SPLIT.fullmatch(name)}
    split: dict[tuple[str, str], Tensors] = {}
    for name in [name for name in tensors if name not in whole]:
        prefix, part, leaf = SPLIT.fullmatch(name).groups()
        split.setdefault((prefix, leaf), {})[part[0]] = tensors[name]
    for leaf in ("weight", "bias"):
        if f"attn_pool.qkv.{leaf}" in whole:
            parts = np.split(whole.pop(f"attn_pool.qkv.{leaf}"), 3)
            split["attn_pool.", leaf] = dict(zip("qkv", parts, strict=True))
    for (prefix, leaf), parts in split.items():
        if prefix == "attn_pool." and "k" in parts and "v" in parts:
            whole[f"{prefix}kv.{leaf}"] = np.concatenate([parts.pop("k"), parts.pop("v")])
        if set(parts) == {"q", "k", "v"}:
            whole[f"{prefix}qkv.{leaf}"] = np.concatenate([parts[part] for part in "qkv"])
        elif set(parts) == {"q", "v"} and leaf == "bias":  # keys have none
            whole |= {f"{prefix}{part}_bias": array for part, array in parts.items()}
        else:
            whole |= {f"{prefix}{part}.{leaf}": array for part, array in parts.items()}
    return whole


def layer_scale_alias(name: str) -> str:
    """ls1.gamma is gamma_1 in EVA and BEiT; other names stay."""
    name, count = re.subn(r"ls([12])\.gamma$", r"gamma_\1", name)
    return name if count else re.sub(r"gamma_([12])$", r"ls\1.gamma", name)


def adapted(tensors: Tensors, names: Collection[str]) -> Tensors:
    """What a file has of the parameters with these names, where it has them in another form.

    Heads and pooling that a model does without are left out, as in timm: with num_classes=0 it has
    no head. So is what was there for training alone.
    """
    tensors = {name: a for name, a in tensors.items() if name in names or not of_recovery(name)}
    known = {alias: name for name in names for alias in (name, layer_scale_alias(name))}
    tensors = {known.get(name, name): array for name, array in tensors.items()}
    parts = ["head.", "head_dist.", "attn_pool."]
    if not any(name.startswith("head.") for name in names):
        parts.append("aux_head.")  # a classifier that does without it has other logits
    for part in parts:
        if not any(name.startswith(part) for name in names):
            tensors = {name: a for name, a in tensors.items() if not name.startswith(part)}
    moves = dict(dist_token="reg_token")  # read by no head of its own, it is a register
    moves |= {f"norm.{leaf}": f"fc_norm.{leaf}" for leaf in ("weight", "bias")}
    for old, new in moves.items():
        if old in tensors.keys() - names and new in names - tensors.keys():
            tensors[new] = tensors.pop(old)
    if FREQUENCIES in tensors and tensors[FREQUENCIES].ndim == 4:
        # (2, depth, H, C / 2); here each block has its own
        blocks = np.moveaxis(tensors.pop(FREQUENCIES), 1, 0)
        tensors |= {f"blocks.{i}.attn.freqs": part for i, part in enumerate(blocks)}
    if SHARED_TABLE in tensors.keys() - names:  # BEiT's pretraining has one table for all blocks
        table = tensors.pop(SHARED_TABLE)
        ends = ".attn.relative_position_bias_table"
        tensors = {name: table for name in names if name.endswith(ends)} | tensors
    return with_known_biases(tensors, names)


def with_known_biases(tensors: Tensors, names: Collection[str]) -> Tensors:
    """Biases of q, k and v in one or apart (EVA and BEiT have none for keys), as `names` has them.

    A missing bias is one of zeros, and one of zeros may be missing.
    """
    tensors = dict(tensors)
    unknown = [name for name in tensors if name not in names]
    for stem in [name.removesuffix("qkv.bias") for name in unknown if name.endswith("qkv.bias")]:
        bias = tensors[f"{stem}qkv.bias"]
        q, k, v = np.array_split(bias, 3)
        if f"{stem}q_bias" in names and not k.any():
            tensors |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
        elif bias.any():
            continue
        del tensors[f"{stem}qkv.bias"]
    for stem in [name.removesuffix("q_bias") for name in unknown if name.endswith("q_bias")]:
        if f"{stem}v_bias" not in tensors:
            continue
        q, v = tensors[f"{stem}q_bias"], tensors[f"{stem}v_bias"]
        if f"{stem}qkv.bias" in names:
            tensors[f"{stem}qkv.bias"] = np.concatenate([q, np.zeros_like(q), v])
        elif q.any() or v.any():
            continue
        del tensors[f"{stem}q_bias"], tensors[f"{stem}v_bias"]
    return tensors


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
    fresh = leaves(like)
    names = {timm_name(path): path for path in fresh}
    tensors = adapted(with_timm_names(tensors), names.keys())
    # A file may well have no head, and one of another method has no parameters of this reducer, nor
    # need one of the same method have what there is for training alone.
    trained = any("reduction" in names[name] for name in tensors if name in names)
    own = {
        name: to_torch(path, np.asarray(fresh[path]), model)
        for name, path in names.items()
        if (new_head and path[0].startswith("head"))
        or ("reduction" in path and not trained)
        or of_recovery(name)
    }
    tensors = own | tensors
    problems = [f"{name} is missing" for name in names if name not in tensors]
    hint = "; patch_head=True builds it"
    problems += [
        f"{name} is not part of the model" + hint * name.startswith("aux_head.")
        for name in tensors
        if name not in names
    ]
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
    if model.split_qkv:
        for name in [name for name in tensors if name.endswith("attn.qkv.weight")]:
            start = name.removesuffix("qkv.weight")
            for part, array in zip("qkv", np.split(tensors.pop(name), 3), strict=True):
                tensors[f"{start}{part}_proj.weight"] = array
                if part != "k" and f"{start}{part}_bias" in tensors:
                    tensors[f"{start}{part}_proj.bias"] = tensors.pop(f"{start}{part}_bias")
    return tensors
