# SPDX-License-Identifier: Apache-2.0
"""A model as its folder describes it: config.json of Hugging Face transformers, or of timm's hub.

transformers: ViT, DeiT, Dinov2, Dinov2WithRegisters, DINOv3ViT, CLIPVision, SiglipVision and
Siglip2Vision, alone or as the image tower of a larger model. What the model of transformers calls
pooled is what a backbone with num_classes=0 returns, but for ViT and DeiT, whose pooler has a layer
of its own that is left out.
"""

import json
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evit_jax.errors import InputError, check_name
from evit_jax.models import named
from evit_jax.models.card import Preprocessing

Config = Mapping[str, Any]
Settings = dict[str, Any]

TOWERS = {name: f"{name}_vision_model" for name in ("clip", "siglip", "siglip2")}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers
SAME = ("num_heads", "rope", "rope_temperature", "mlp")  # what weights do not tell


def is_folder(name: str) -> bool:
    """Whether a model's name is the path of such a folder."""
    return Path(name, "config.json").is_file()


def find(name: str) -> tuple[str, Settings, Preprocessing]:
    """A folder -> (backbone, its settings, Preprocessing).

    Raises:
      InputError: a model of another kind, or one with a part that no backbone here has.
    """
    config = read(name, "config.json")
    if "architecture" in config:
        architecture = check_name("architecture", str(config["architecture"]), named.table())
        tag = (config.get("pretrained_cfg") or {}).get("tag")
        tagged = f"{architecture}.{tag}" if tag else architecture
        backbone, settings, card = named.find(tagged)
        return backbone, settings | dict(num_classes=config.get("num_classes", 0)), card
    try:
        backbone, settings = from_transformers(config)
        return backbone, settings, card_of(read(name, "preprocessor_config.json"), settings)
    except InputError as error:
        raise InputError(f"{name}/config.json: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        text = f"{type(error).__name__} {error}"
        raise InputError(f"{name}/config.json is not as transformers writes it ({text})") from None


def check(name: str, model) -> None:
    """Raises InputError where a folder's config.json is of another model than `model`."""
    _, settings, _ = find(name)
    if settings["width"] != model.width:
        return  # as shapes will tell
    for field in SAME:
        theirs, ours = settings.get(field), getattr(model, field, None)
        if None not in (theirs, ours) and theirs != ours:
            raise InputError(
                f"{name}/config.json has {field} {theirs}, the model {ours}; "
                f"create_model({name!r}) builds the folder's own"
            )


def read(name: str, file: str) -> dict[str, Any]:
    """A JSON file of the folder; {} where there is none."""
    path = Path(name, file)
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def from_transformers(whole: Config) -> tuple[str, Settings]:
    """A config.json of transformers -> the backbone and its settings."""
    kind = TOWERS.get(whole.get("model_type"), whole.get("model_type"))
    config = whole["vision_config"] if whole.get("model_type") in TOWERS else whole
    backbone, own = FAMILIES[check_name("model_type", str(kind), FAMILIES)](config, whole)
    activation = config.get("hidden_act", "gelu")
    settings = dict(
        patch_size=sides(config["patch_size"]),
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        norm_eps=config.get("layer_norm_eps", 1e-6),
        activation=ACTIVATIONS[check_name("hidden_act", activation, ACTIVATIONS)],
        position_resize="bicubic",
        num_classes=0,
    )
    if "image_size" in config:
        settings["image_size"] = sides(config["image_size"])
    if "intermediate_size" in config:
        settings["mlp_ratio"] = ratio(config["intermediate_size"], config["hidden_size"])
    if "ForImageClassification" in saved_class(whole):
        settings["num_classes"] = len(whole.get("id2label") or (0, 1))
    return backbone, settings | own


def saved_class(config: Config) -> str:
    """The class that was saved, such as "ViTForImageClassification"."""
    return (config.get("architectures") or [""])[0]


def sides(size: int | list[int]) -> tuple[int, int]:
    """One side or two -> (height, width)."""
    return (size, size) if isinstance(size, int) else tuple(size)


def ratio(hidden: int, width: int) -> float:
    """mlp_ratio, so that int(width * ratio) is exactly hidden."""
    exact = hidden / width
    return exact if int(width * exact) == hidden else math.nextafter(exact, math.inf)


def vit(config: Config, whole: Config) -> tuple[str, Settings]:
    return "vit", dict(qkv_bias=config.get("qkv_bias", True))


def deit(config: Config, whole: Config) -> tuple[str, Settings]:
    # Without the teacher's head nobody reads the distillation token: it is a register.
    distilled = "WithTeacher" in saved_class(whole)
    token = dict(distilled=True) if distilled else dict(registers=1)
    return "vit", token | dict(qkv_bias=config.get("qkv_bias", True))


def dinov2(config: Config, whole: Config) -> tuple[str, Settings]:
    width = config["hidden_size"]
    hidden = int(width * config["mlp_ratio"])
    mlp = dict(mlp_ratio=ratio(hidden, width))
    if config.get("use_swiglu_ffn"):
        packed = 2 * ((hidden * 2 // 3 + 7) // 8 * 8)
        mlp = dict(mlp="swiglu_packed", activation="silu", mlp_ratio=ratio(packed, width))
    if "ForImageClassification" in saved_class(whole):
        text = "the classifier reads class token and mean of the patches, and is left out"
        warnings.warn(f"{text}: the model returns features", stacklevel=2)
        mlp |= dict(num_classes=0)
    qkv_bias = config.get("qkv_bias", True)
    return "vit", mlp | dict(layer_scale=config["layerscale_value"], qkv_bias=qkv_bias)


def dinov2_with_registers(config: Config, whole: Config) -> tuple[str, Settings]:
    backbone, settings = dinov2(config, whole)
    registers = dict(registers=config["num_register_tokens"], no_embed_class=True)
    return backbone, settings | registers | dict(position_resize="bicubic_antialias")


def dinov3(config: Config, whole: Config) -> tuple[str, Settings]:
    biases = [config[f"{part}_bias"] for part in ("query", "key", "value")]
    kinds = {(True, True, True): True, (True, False, True): "qv", (False, False, False): False}
    others = config["proj_bias"], config["mlp_bias"]
    if tuple(biases) not in kinds or others[0] != others[1]:
        raise InputError("biases of only some of its layers are not supported")
    return "eva", dict(
        registers=config["num_register_tokens"],
        layer_scale=config["layerscale_value"],
        qkv_bias=kinds[tuple(biases)],
        proj_bias=others[0],
        mlp="swiglu" if config["use_gated_mlp"] else "plain",
        pool="token",
        absolute_positions=False,
        rope="dinov3",
        rope_temperature=config["rope_theta"],
    )


def clip(config: Config, whole: Config) -> tuple[str, Settings]:
    projected = saved_class(whole) in ("CLIPModel", "CLIPVisionModelWithProjection")
    classes = dict(num_classes=whole["projection_dim"]) if projected else {}
    return "vit", dict(pre_norm=True) | classes


def siglip(config: Config, whole: Config) -> tuple[str, Settings]:
    averaged = "ForImageClassification" in saved_class(whole)
    if averaged or not config.get("vision_use_head", True):
        return "vit", dict(class_token=False, pool="avg", fc_norm=False)
    return "vit", dict(class_token=False, pool="map")


def siglip2(config: Config, whole: Config) -> tuple[str, Settings]:
    backbone, settings = siglip(config, whole)
    patch = sides(config["patch_size"])[0]
    side = math.isqrt(config["num_patches"]) * patch
    return backbone, settings | dict(image_size=(side, side), position_resize="bilinear_antialias")


FAMILIES = dict(
    vit=vit,
    deit=deit,
    dinov2=dinov2,
    dinov2_with_registers=dinov2_with_registers,
    dinov3_vit=dinov3,
    clip_vision_model=clip,
    siglip_vision_model=siglip,
    siglip2_vision_model=siglip2,
)


def card_of(config: Config, settings: Settings) -> Preprocessing:
    """A preprocessor_config.json -> the card; without one, that of a model without a name."""
    card: dict[str, Any] = {}
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in config:
            card[ours] = tuple(config[theirs])
    if "resample" in config:
        card["interpolation"] = INTERPOLATIONS.get(config["resample"], "bicubic")
    if config.get("do_center_crop") and "crop_size" in config:
        inside, around = (side_of(config.get(name)) for name in ("crop_size", "size"))
        card["crop"] = min(inside / around, 1.0)
    elif config:  # resized to the size, whatever the aspect
        card["squash"] = True
    return Preprocessing(**card)


def side_of(size: int | Mapping[str, int]) -> int:
    """The side of an image processor's size, which may be written in three ways."""
    return size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))
