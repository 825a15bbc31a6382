# SPDX-License-Identifier: Apache-2.0
"""Compares models with timm's of the same name: `python -m tests.compare_timm NAMES | --all`.

For an environment that has timm (1.0.31 is what the package's table was made from), which neither
package nor suite needs. For every name timm builds the model with random weights, all of them:
norms, LayerScale, biases, class token, registers and positions too, so that no two parts could be
taken for each other. Its state goes into a file and through our loader, by name. Then the logits,
the pooled features (num_classes=0) and all patch tokens after the last norm are compared in
float32, at the size of the name and at another size and aspect, for which timm resizes as it loads.

It is the arithmetic that is compared, so models have two blocks, and those that are wider than 384
have fewer heads of the same width, with the same ratio of the MLP. A name agrees where no value is
off by more than 2e-5 of the largest.

  NAMES   timm's, * for any characters
  --all   every name of timm's vision_transformer.py, deit.py, eva.py and beit.py

Prints a row for each name, then one line of JSON: how many were compared and agree, and the others.
"""

import argparse
import fnmatch
import json
import math
import tempfile
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np

from evit_jax.errors import InputError
from evit_jax.models import create_model

TOLERANCE = 2e-5  # of the largest value
FILES = ("vision_transformer", "deit", "eva", "beit")
DEPTH, WIDEST, CLASSES, IMAGES = 2, 384, 7, 2
MEASURES = ("logits", "pooled", "patches")


def narrow(width: int, heads: int) -> dict[str, int]:
    """Width and heads of a model no wider than WIDEST, with heads of the same width."""
    fewer = max(min(heads, WIDEST // (width // heads)), 1)
    return dict(width=width // heads * fewer, num_heads=fewer)


def draw(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random values for one parameter of timm's, on the scale on which it does something."""
    values = rng.normal(size=shape).astype(np.float32)
    leaf = name.rpartition(".")[2]
    if leaf.startswith("gamma"):
        return 0.6 + 0.2 * values
    if leaf == "weight" and len(shape) == 1:  # a norm
        return 1 + 0.2 * values
    if leaf == "weight":
        return values / math.sqrt(math.prod(shape[1:]))
    return 0.3 * values


def randomize(model, seed: int) -> None:
    """Draws all parameters; frequencies of rotary positions only change a little."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.from_numpy(draw(name, tuple(parameter.shape), rng))
            if "rope" in name:
                values = parameter * (1 + 0.1 * values)
            parameter.copy_(values)


def other_size(size: tuple[int, int], patch: tuple[int, int]) -> tuple[int, int]:
    """An image size with fewer rows of patches, and more columns."""
    rows, columns = (side // p for side, p in zip(size, patch, strict=True))
    return max(rows - 2, 1) * patch[0], (columns + 1) * patch[1]


def theirs(model, images: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared, of timm's model."""
    import torch

    with torch.no_grad():
        tokens = model.forward_features(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
        values = dict(
            logits=model.forward_head(tokens),
            pooled=model.forward_head(tokens, pre_logits=True),
            patches=tokens[:, model.num_prefix_tokens :],
        )
    return {name: value.numpy() for name, value in values.items()}


def ours(model, params: dict, images: np.ndarray) -> dict[str, np.ndarray]:
    """What is compared, of our model."""

    @jax.jit
    def run(params, images):
        logits, out = model.apply({"params": params}, images)
        pooled, _ = model.clone(num_classes=0).apply({"params": params}, images)
        return dict(logits=logits, pooled=pooled, patches=out["dense"])

    return jax.tree.map(np.asarray, run(params, images))


def compare(name: str) -> dict[str, float]:
    """The largest differences relative to the largest value, by size and what is compared."""
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.device("meta"):
        whole = timm.create_model(name)
    # Without a tag DeiT's names mean DeiT's resizing.
    tagged = f"{name}.{tag}" if (tag := whole.pretrained_cfg["tag"]) else name
    size, patch = whole.patch_embed.img_size, whole.patch_embed.patch_size
    heads = whole.blocks[0].attn.num_heads if hasattr(whole.blocks[0], "attn") else 1
    sizes = narrow(whole.embed_dim, heads)
    changes = dict(embed_dim=sizes["width"], num_heads=sizes["num_heads"])
    changes |= dict(depth=DEPTH, num_classes=CLASSES)
    model = timm.create_model(name, **changes).eval()
    randomize(model, zlib.crc32(name.encode()))
    differences = {}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "model.safetensors")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
        for label, pixels in (("native", size), ("other", other_size(size, patch))):
            if label == "other":  # as timm loads weights that it has downloaded
                loaded = dict(file=file, num_classes=CLASSES, custom_load=False)
                model = timm.create_model(
                    name, pretrained=True, pretrained_cfg_overlay=loaded, img_size=pixels, **changes
                ).eval()
            settings = sizes | dict(depth=DEPTH, num_classes=CLASSES, image_size=pixels)
            mine, params = create_model(tagged, weights=file, **settings)
            images = np.random.default_rng(1).normal(size=(IMAGES, *pixels, 3)).astype(np.float32)
            expected, got = theirs(model, images), ours(mine, params, images)
            for measure in MEASURES:
                a, b = expected[measure], got[measure]
                assert a.shape == b.shape, (measure, a.shape, b.shape)
                differences[f"{label} {measure}"] = float(np.abs(a - b).max() / np.abs(a).max())
    jax.clear_caches()
    return differences


def main() -> None:
    import timm
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAMES")
    parser.add_argument("--all", action="store_true", help="every name of the four files")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    known = [name for file in FILES for name in timm.list_models(module=file)]
    patterns = ["*"] if flags.all else flags.names
    names = [name for name in known if any(fnmatch.fnmatch(name, p) for p in patterns)]
    columns = [f"{label} {measure}" for label in ("native", "other") for measure in MEASURES]
    print(f"{'name':50}", *(f"{column:>14}" for column in columns), flush=True)
    agree, others = [], {}
    for name in names:
        try:
            differences = compare(name)
        except (InputError, AssertionError) as error:
            others[name] = str(error)
            print(f"{name:50} {error}", flush=True)
            continue
        print(f"{name:50}", *(f"{differences[c]:14.1e}" for c in columns), flush=True)
        if max(differences.values()) <= TOLERANCE:
            agree.append(name)
        else:
            others[name] = f"off by {max(differences.values()):.1e}"
    print(json.dumps(dict(names=len(names), agree=len(agree), others=others)))


if __name__ == "__main__":
    main()
