# SPDX-License-Identifier: Apache-2.0
"""Writes evit_jax/models/names.json: the Vision Transformers that timm names, as facts.

python -m tests.scripts.timm_names [OUT]

Needs timm (1.0.31 wrote the committed file). Each name's settings are what timm's model class is
given, in our words; its tags are timm's `default_cfgs`; its parameters are counted in timm's model.
What a name needs and the package does not have stands under `missing`, so that asking for it says
so.
"""

import functools
import json
import math
import sys
import warnings
from pathlib import Path

from evit_jax.models.card import STATISTICS

OUT = Path(__file__).parents[2] / "evit_jax" / "models" / "names.json"
FILES = {"vision_transformer": "vit", "deit": "vit", "eva": "eva", "beit": "beit"}
# DeiT and EViT evaluate at 224/256 of the resized side at every size. A name without a tag means
# their way, one with a tag timm's.
UNTAGGED = {"deit_": dict(crop=0.875, position_resize="bicubic")}
# How positions are made for another image size, by what is in a name; timm's others: bicubic.
RESIZED = {
    "base_patch16_radio_v3": "bilinear_corners",
    "huge_patch16_radio_v3": "bilinear_corners",
    "radio": "bilinear",
    "flexivit": "bilinear",
}
SWITCHES = dict(
    embed_dim="width", depth="depth", num_heads="num_heads", patch_size="patch_size",
    class_token="class_token", reg_tokens="registers", num_reg_tokens="registers",
    no_embed_class="no_embed_class", pre_norm="pre_norm", use_pre_transformer_norm="pre_norm",
    final_norm="final_norm", fc_norm="fc_norm", use_fc_norm="fc_norm",
    use_post_transformer_norm="final_norm", global_pool="pool", init_values="layer_scale",
    qk_norm="qk_norm", qkv_bias="qkv_bias", proj_bias="proj_bias", use_post_norm="post_norm",
    attn_pool_num_heads="pool_heads", attn_pool_mlp_ratio="pool_mlp_ratio",
    pool_include_prefix="pool_prefix", use_abs_pos_emb="absolute_positions",
    rope_temperature="rope_temperature", rope_grid_indexing="rope_grid",
    rope_grid_offset="rope_offset", ref_feat_shape="rope_reference",
)  # fmt: skip
DEFAULTS = dict(
    width=768, depth=12, num_heads=12, patch_size=16, class_token=True, distilled=False,
    registers=0, no_embed_class=False, pre_norm=False, embed_norm=False, layer_scale=None,
    post_norm=False, qk_norm=False, inner_norm=False, norm="layer", norm_eps=1e-6, qkv_bias=True,
    split_qkv=False, proj_bias=True, activation="gelu", mlp="plain", mlp_ratio=4.0, pool="token",
    pool_heads=None, pool_mlp_ratio=None, pool_prefix=False, fc_norm=None, final_norm=True,
    absolute_positions=True, rope="none",
)  # fmt: skip
SHOWN = ("width", "depth", "num_heads", "patch_size")  # even where they are the default
BLOCKS = {
    "ParallelThingsBlock": "parallel blocks",
    "ParallelScalingBlock": "attention and MLP in parallel",
    "DiffParallelScalingBlock": "differential attention, attention and MLP in parallel",
}
IGNORED = {  # of training and of timm's own resizing; the next line's are read elsewhere
    "img_size", "in_chans", "num_classes", "dynamic_img_size", "rope_rescale_coords",
    "weight_init", "fix_init", "norm_layer", "act_layer", "mlp_layer", "mlp_ratio",
    "embed_norm_layer", "block_fn", "attn_layer", "scale_attn_norm", "scale_mlp_norm",
    "swiglu_mlp", "swiglu_align_to", "scale_mlp", "scale_attn_inner", "attn_type", "qkv_fused",
    "num_kv_heads", "attn_only_layer_scale", "use_rot_pos_emb", "rope_type", "rope_rotate_half",
    "use_rel_pos_bias",
}  # fmt: skip


class Recorded(Exception):
    """Thrown in place of building a model, with what its class was given."""


def record(name: str, classes) -> tuple[str, dict]:
    """The class that timm builds for a name, and its keyword arguments."""
    import timm

    def refuse(self, *args, **given):
        raise Recorded(type(self).__name__, given)

    kept = {each: each.__init__ for each in classes}
    try:
        for each in classes:
            each.__init__ = refuse
        timm.create_model(name)
    except Recorded as recorded:
        built, given = recorded.args
        return built, dict(patch_size=16, embed_dim=768, depth=12, num_heads=12) | given
    finally:
        for each, init in kept.items():
            each.__init__ = init
    raise RuntimeError(f"{name} built none of {classes}")


def kind_of_norm(layer) -> tuple[str, float]:
    """Ours and its epsilon, of what timm takes as norm_layer."""
    keywords = layer.keywords if isinstance(layer, functools.partial) else {}
    layer = getattr(layer, "func", layer)
    name = layer if isinstance(layer, str) else getattr(layer, "__name__", "LayerNorm")
    return ("rms" if "rms" in name.lower() else "layer"), keywords.get("eps", 1e-6)


def ratio_of(hidden: int, width: int, ratio: float) -> float:
    """A ratio with int(width * ratio) == hidden: this one, else a short one."""
    if int(width * ratio) == hidden:
        return float(ratio)
    for digits in range(1, 17):
        ratio = math.ceil(hidden / width * 10**digits) / 10**digits
        if int(width * ratio) == hidden:
            return ratio
    raise ValueError(f"no ratio gives {hidden} of {width}")


def mlp_of(given: dict, kind: str) -> dict:
    """mlp, activation and mlp_ratio."""
    width, ratio = given.get("embed_dim", 768), given.get("mlp_ratio", 4.0)
    hidden = int(width * ratio)
    if kind == "vit":
        layer = given.get("mlp_layer")
        layer = getattr(getattr(layer, "func", layer), "__name__", "Mlp")
        mlp = {"Mlp": "plain", "SwiGLU": "swiglu", "GluMlp": "swiglu_packed"}[layer]
        activation = given.get("act_layer") or "gelu"
        activation = activation if isinstance(activation, str) else activation.__name__.lower()
        return dict(mlp=mlp, activation=activation, mlp_ratio=ratio_of(hidden, width, ratio))
    if not given.get("swiglu_mlp"):
        return dict(mlp="plain", activation="gelu", mlp_ratio=ratio_of(hidden, width, ratio))
    if given.get("scale_mlp") or given.get("swiglu_align_to"):
        hidden += -hidden % (given.get("swiglu_align_to") or 1)
        return dict(mlp="swiglu", activation="silu", mlp_ratio=ratio_of(hidden, width, ratio))
    return dict(
        mlp="swiglu_packed", activation="silu", mlp_ratio=ratio_of(2 * hidden, width, 2 * ratio)
    )


def settings_of(kind: str, given: dict) -> dict:
    """Our settings of a backbone for what timm's class was given."""
    unknown = given.keys() - SWITCHES.keys() - IGNORED
    if unknown:
        raise ValueError(f"what are {sorted(unknown)}?")
    settings = {SWITCHES[key]: value for key, value in given.items() if key in SWITCHES}
    settings["norm"], settings["norm_eps"] = kind_of_norm(given.get("norm_layer"))
    settings |= mlp_of(given, kind)
    if "block_fn" in given and given["block_fn"].__name__ == "ResPostBlock":
        settings["post_norm"] = True
        settings.pop("layer_scale", None)  # it is what the norms start from
    if given.get("embed_norm_layer"):
        settings["embed_norm"] = True
    if given.get("scale_attn_norm") or given.get("scale_attn_inner"):
        settings["inner_norm"] = True
    if kind != "vit":
        settings.setdefault("pool", "avg")
        if settings.get("qkv_bias", True) and given.get("attn_type", "eva") == "eva":
            settings["qkv_bias"] = "qv"
    if not given.get("qkv_fused", True):
        settings["split_qkv"] = True
    if kind == "eva" and given.get("scale_mlp") and not given.get("scale_attn_inner"):
        settings["mlp_norm"] = True
    if kind == "eva" and given.get("global_pool") == "map":
        settings["pool_prefix"] = True
    if given.get("use_rot_pos_emb"):
        settings["rope"] = given.get("rope_type", "cat")
    if "rope_reference" in settings:
        settings["rope_reference"] = list(settings["rope_reference"])
    return {
        key: value
        for key, value in settings.items()
        if key in SHOWN or DEFAULTS.get(key, "none") != value
    }


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """One side or two -> (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def missing_of(given: dict) -> str | None:
    """What the package lacks for such a model."""
    block = given["block_fn"].__name__ if "block_fn" in given else None
    lacking = [BLOCKS[block]] if block in BLOCKS else []
    if given.get("attn_layer") == "diff":
        lacking.append("differential attention")
    if any(heads != given["num_heads"] for heads in given.get("num_kv_heads") or ()):
        lacking.append("queries in groups that share keys and values")
    if given.get("attn_only_layer_scale"):
        lacking.append("LayerScale of attention alone")
    if any(side % given["patch_size"] for side in pair(given["img_size"])):
        lacking.append("images of which the last pixels are in no patch")
    return " and ".join(lacking) or None


def card_of(cfg) -> dict:
    """A tag's preprocessing, classes and image size."""
    statistics = {(value["mean"], value["std"]): name for name, value in STATISTICS.items()}
    _, height, width = cfg.input_size
    card = dict(
        image_size=height if height == width else [height, width],
        statistics=statistics[tuple(cfg.mean), tuple(cfg.std)],
        crop=cfg.crop_pct,
    )
    if cfg.interpolation != "bicubic":
        card["interpolation"] = cfg.interpolation
    if cfg.crop_mode == "squash":
        card["squash"] = True
    return card | dict(num_classes=cfg.num_classes)


def count_parameters(name: str) -> int:
    """Of timm's model with its own head."""
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


def entry_of(name: str, kind: str, cfgs, classes) -> dict:
    """The whole entry of one name."""
    built, given = record(name, classes)
    beyond = dict(distilled=True) if built == "VisionTransformerDistilled" else {}
    if resized := next((how for part, how in RESIZED.items() if part in name), None):
        beyond["position_resize"] = resized
    settings = settings_of(kind, given) | beyond
    entry = dict(backbone=kind, settings=settings)
    if missing := missing_of(given):
        entry["missing"] = missing
    for prefix, card in UNTAGGED.items():
        if name.startswith(prefix):
            entry["untagged"] = card
    entry["parameters"] = count_parameters(name)
    entry["tags"] = {tag: card_of(cfgs.cfgs[tag]) for tag in cfgs.tags}
    for tag in list(entry["tags"])[1:]:  # a tag could set more than its card does
        if settings_of(kind, record(f"{name}.{tag}", classes)[1]) | beyond != settings:
            raise ValueError(f"{name}.{tag} has other settings than {name}")
    return entry


def written(names: dict) -> str:
    """JSON with one line per name and one per tag."""
    lines = ["{"]
    for name, entry in sorted(names.items()):
        head = json.dumps({key: value for key, value in entry.items() if key != "tags"})
        lines.append(f'"{name}": {head[:-1]}, "tags": {{')
        tags = [f' "{tag}": {json.dumps(card)}' for tag, card in entry["tags"].items()]
        lines += [",\n".join(tags), "}},"]
    return "\n".join(lines)[:-1] + "\n}\n"


def main() -> None:
    warnings.simplefilter("ignore")
    from timm.models import _registry, beit, deit, eva, vision_transformer

    classes = (
        vision_transformer.VisionTransformer, deit.VisionTransformerDistilled, eva.Eva, beit.Beit
    )  # fmt: skip
    names = {}
    for file, kind in FILES.items():
        for name in sorted(_registry._module_to_models[file]):
            if name not in _registry._deprecated_models:
                cfgs = _registry._model_default_cfgs[name]
                names[name] = entry_of(name, kind, cfgs, classes)
                print(f"{name}  {names[name]['parameters']:,}", file=sys.stderr)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    out.write_text(written(names))
    lacking = [name for name, entry in names.items() if "missing" in entry]
    tags = sum(len(entry["tags"]) for entry in names.values())
    print(json.dumps(dict(names=len(names), tags=tags, missing=len(lacking), path=str(out))))


if __name__ == "__main__":
    main()
