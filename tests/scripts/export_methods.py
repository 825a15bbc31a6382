# SPDX-License-Identifier: Apache-2.0
"""Exports a small model with every method, and compares each file with Flax.

python -m tests.scripts.export_methods --format=onnx [METHOD ...]

A line for each method: the tokens after each block, and the largest difference of a logit at
batches of 1 and 5 of one file; of a format that wants the batch as a number, at a batch of 3.
"""

import argparse
import tempfile
from pathlib import Path

import jax
import numpy as np

from evit_jax.errors import InputError
from evit_jax.export import onnx, savedmodel, stablehlo
from evit_jax.models import build_model, init_params
from evit_jax.reducers import known_reducers
from evit_jax.tables import runs

FORMATS = dict(onnx=onnx, savedmodel=savedmodel, stablehlo=stablehlo)
SIZES = dict(image_size=32, patch_size=4, width=32, depth=4, num_heads=2, num_classes=10)
TWICE = dict(keep_rate=0.6, layers=(1, 2))
# Those that decide on their own where, or how much.
PLANS = dict(window=dict(layers=(1,)), stvit=dict(keep_rate=0.6), hiprune=dict(keep_rate=0.6))
PLANS |= dict(shift={}, diffrate_search=dict(keep_rate=0.6))


def differences(module, name: str, batch: int | None, path: Path) -> tuple[object, list[float]]:
    """(the model, the largest difference at each size of a batch).

    Raises:
      InputError: the format cannot take it.
    """
    model = build_model("vit", **SIZES, reducer=name, **PLANS.get(name, TWICE))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: p + rng.normal(0, 0.02, p.shape).astype(np.float32),
        init_params(model, jax.random.key(0)),
    )

    def logits(images):
        return model.apply({"params": params}, images)[0]

    module.write(path, logits, model.image_size, batch=batch)
    call, found = module.load(path), []
    for size in (batch,) if batch else (1, 5):
        images = rng.normal(size=(size, *model.image_size, 3)).astype(np.float32)
        found.append(float(np.abs(np.asarray(call(images)) - logits(images)).max()))
    return model, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--format", choices=list(FORMATS), default="onnx")
    parser.add_argument("methods", nargs="*", metavar="METHOD", default=known_reducers())
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in flags.methods:
            for batch in (None, 3):
                try:
                    path = Path(folder) / f"{name}_{batch}"
                    model, found = differences(FORMATS[flags.format], name, batch, path)
                except InputError as error:
                    print(f"{name}, batch {batch or 'any'}: {error}", flush=True)
                    continue
                tokens, off = runs(model.tokens_per_block), ", ".join(f"{x:.1e}" for x in found)
                print(f"{name}, batch {batch or 'any'}: tokens {tokens}; off {off}", flush=True)
                break


if __name__ == "__main__":
    main()
