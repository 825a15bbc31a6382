# SPDX-License-Identifier: Apache-2.0
"""Compares models with those of Hugging Face: `python -m tests.compare_transformers [NAMES]`.

For an environment that has transformers (5.24 was compared), which neither package nor suite
needs. transformers builds a small model of each family with random weights, all of them: norms,
LayerScale, biases, tokens and positions too. It saves a folder, whole and in several parts, and
create_model(FOLDER) reads it. Then the last hidden state, the pooled output and the logits, where
there are some, are compared in float32, at the size of the config and at another size and aspect,
for which both resize the positions. A value agrees where it is off by at most 2e-5 of the largest.

  NAMES   of the cases below, * for any characters; default all
  --keep  a folder to keep what was saved in, beside what is expected, as the suite reads it

Prints a row for each case, then one line of JSON: how many were compared and agree, and the others.
"""

import argparse
import fnmatch
import json
import shutil
import tempfile
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from evit_jax.models import create_model
from tests.compare_timm import TOLERANCE, draw

SIZES = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, patch_size=4)
MLP, PIXELS = dict(intermediate_size=40), dict(image_size=24)
NATIVE, OTHER = (24, 24), (16, 28)
LABELS = dict(id2label={str(i): f"class {i}" for i in range(5)})
PLAIN = SIZES | MLP | PIXELS
SIGLIP2 = SIZES | MLP | dict(num_patches=36)
# Case -> (class, config class, its fields). SigLIP's whole models have a text tower beside.
CASES = {
    "vit": ("ViTModel", "ViTConfig", PLAIN),
    "vit_head": ("ViTForImageClassification", "ViTConfig", PLAIN | LABELS),
    "deit": ("DeiTModel", "DeiTConfig", PLAIN),
    "deit_head": ("DeiTForImageClassification", "DeiTConfig", PLAIN | LABELS),
    "deit_distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", PLAIN | LABELS),
    "dinov2": ("Dinov2Model", "Dinov2Config", SIZES | PIXELS),
    "dinov2_swiglu": ("Dinov2Model", "Dinov2Config", SIZES | PIXELS | dict(use_swiglu_ffn=True)),
    "dinov2_registers": (
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", SIZES | PIXELS
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", PLAIN | dict(num_register_tokens=4)),
    "dinov3_gated": (
        "DINOv3ViTModel", "DINOv3ViTConfig",
        PLAIN | dict(num_register_tokens=4, use_gated_mlp=True, hidden_act="silu"),
    ),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", PLAIN),
    "clip_projection": (
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", PLAIN | dict(projection_dim=20)
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", PLAIN),
    "siglip_head": ("SiglipForImageClassification", "SiglipConfig", PLAIN | LABELS),
    "siglip2": ("Siglip2VisionModel", "Siglip2VisionConfig", SIGLIP2),
}  # fmt: skip
TINY_TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def build(case: str):
    """The model of transformers, with random weights."""
    import torch
    import transformers

    model, config, fields = CASES[case]
    if config == "SiglipConfig":
        sizes = {key: value for key, value in fields.items() if key not in LABELS}
        fields = LABELS | dict(vision_config=sizes, text_config=TINY_TEXT | dict(vocab_size=10))
    model = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name.replace("lambda1", "gamma")
            if "position_embedding" in name:
                name = "positions"
            parameter.copy_(torch.from_numpy(draw(name, tuple(parameter.shape), rng)))
    return model


def theirs(model, images: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared, of the model of transformers."""
    import torch

    kind = model.config.model_type
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    inputs = dict(pixel_values=pixels, interpolate_pos_encoding=True)
    if kind in ("dinov2", "dinov2_with_registers", "dinov3_vit"):
        del inputs["interpolate_pos_encoding"]
    if kind == "siglip2_vision_model":
        inputs = siglip2_inputs(images, model.config.patch_size)
    with torch.no_grad():
        found = model(**inputs)
        hidden = found.get("last_hidden_state")
        values = dict(hidden=hidden, pooled=found.get("pooler_output"))
        values["logits"] = found.get("logits", found.get("image_embeds"))
        if kind in ("vit", "deit"):  # its pooler has a layer of its own
            values["pooled"] = None if hidden is None else hidden[:, 0]
        if kind == "clip_vision_model" and hidden is not None:
            tower = getattr(model, "vision_model", model)
            values["hidden"] = tower.post_layernorm(hidden)  # where ours is normed, too
    return {name: value.numpy() for name, value in values.items() if value is not None}


def siglip2_inputs(images: np.ndarray, patch: int) -> dict:
    """Patches as Siglip2's image processor cuts them."""
    import torch

    batch, height, width, _ = images.shape
    rows, columns = height // patch, width // patch
    patches = images.reshape(batch, rows, patch, columns, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    patches = torch.from_numpy(patches.reshape(batch, rows * columns, -1).copy())
    mask = torch.ones(batch, rows * columns, dtype=torch.int32)
    shapes = torch.tensor([[rows, columns]] * batch)
    return dict(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)


def draw_images(size: tuple[int, int]) -> np.ndarray:
    """Two images (2, height, width, 3), always the same."""
    return np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)


def ours(folder: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared, of the model that the folder describes."""
    model, params = create_model(folder, image_size=images.shape[1:3])

    @jax.jit
    def run(params, images):
        logits, out = model.apply({"params": params}, images)
        pooled, _ = model.clone(num_classes=0).apply({"params": params}, images)
        prefix = [] if model.reads_patches else [out["features"]]
        hidden = jnp.concatenate([*prefix, out["dense"]], axis=1)
        return dict(logits=logits, pooled=pooled, hidden=hidden)

    return jax.tree.map(np.asarray, run(params, images))


def compare(case: str, folder: str, *, shards: bool) -> dict[str, float]:
    """The largest differences relative to the largest value, by size and what is compared."""
    model = build(case)
    model.save_pretrained(folder, max_shard_size="16KB" if shards else "1GB")
    differences, kept = {}, {}
    for label, pixels in (("native", NATIVE), ("other", OTHER)):
        images = draw_images(pixels)
        expected, got = theirs(model, images), ours(folder, images)
        for name, values in expected.items():
            assert values.shape == got[name].shape, (name, values.shape, got[name].shape)
            worst = np.abs(values - got[name]).max() / np.abs(values).max()
            differences[f"{label} {name}"] = float(worst)
            kept[f"{label}.{name}"] = np.ascontiguousarray(values)
    save_file(kept, Path(folder, "expected.safetensors"))
    jax.clear_caches()
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=["*"], metavar="NAMES")
    parser.add_argument("--keep", metavar="FOLDER")
    options = parser.parse_args()
    cases = [case for case in CASES if any(fnmatch.fnmatch(case, by) for by in options.names)]
    failed = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            found = compare(case, folder, shards=list(CASES).index(case) % 2 == 0)
            parts = len(list(Path(folder).glob("model*.safetensors")))
            if options.keep:
                shutil.copytree(folder, Path(options.keep, case), dirs_exist_ok=True)
        worst = max(found, key=found.get)
        if not found[worst] <= TOLERANCE:
            failed[case] = found
        print(f"{case:18} {parts} files  {found[worst]:.1e}  {worst}  of {len(found)}", flush=True)
    print(json.dumps(dict(compared=len(cases), agree=len(cases) - len(failed), failed=failed)))


if __name__ == "__main__":
    main()
