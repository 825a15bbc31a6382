# SPDX-License-Identifier: Apache-2.0
"""What chips that are not there would need, beside big_vision's dense ViT, by the chips' compilers.

git clone https://github.com/google-research/big_vision
python -m tests.scripts.compare_big_vision --big_vision=big_vision [--chips=v5e,v6e] \\
    [--sizes=S,B] [--keep_rates=1,0.7,0.5] [--programs=logits,gradient] [--batch_size=128]

Patches of 16, bfloat16; for the logits the weights are in bfloat16 too, for the gradient of the
cross-entropy they are in float32. Nothing is run. A row is printed as soon as it is compiled, with
its share of big_vision's model in the same program; the last line of standard output is a JSON
object. On a TPU a program takes libtpu one to ten minutes of one core.
"""

import argparse
import json
import pathlib
import sys
import time
import types

import jax
import jax.numpy as jnp
import optax

from evit_jax.measure.chips import Target, param_shapes
from evit_jax.models import build_model

OURS = dict(S="deit_small_patch16_224", B="deit_base_patch16_224")
SCALE = dict(cycles=1e6, bytes=1e9)  # of a row's cost: million cycles, gigabytes
PROGRAMS = ("logits", "gradient")


def big_vision_vit(checkout: pathlib.Path, size: str):
    """(a function of parameters and images, the parameters' shapes) of its model."""
    sys.path.insert(0, str(checkout.resolve()))
    # Both are there to load checkpoints and bring TensorFlow and more; the model needs neither.
    for name in ("big_vision.utils", "big_vision.models.common"):
        sys.modules.setdefault(name, types.ModuleType(name))
    from big_vision.models import vit

    model = vit.Model(1000, variant=f"{size}/16", pool_type="tok", dtype_mm="bfloat16")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    return lambda params, images: model.apply({"params": params}, images)[0], shapes


def our_vit(size: str, keep_rate: float):
    """The same of ours."""
    model = build_model(OURS[size], keep_rate=keep_rate, dtype="bfloat16")
    return lambda params, images: model.apply({"params": params}, images)[0], param_shapes(model)


def estimate(target: Target, program: str, logits, params, batch_size: int):
    """An `Estimate` of one of PROGRAMS."""
    if program == "logits":
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)

    def loss(params, batch):
        x = logits(params, batch["image"]).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(x, batch["label"]).mean()

    def forward(params, batch):
        return logits(params, batch["image"])

    batch = dict(
        image=jax.ShapeDtypeStruct((batch_size, 224, 224, 3), jnp.float32),
        label=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    )
    function = dict(logits=forward, gradient=jax.grad(loss))[program]
    return target.estimate(
        lambda devices: devices.compile_eval(function).lower(params, batch).compile()
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--big_vision", type=pathlib.Path, help="its checkout; without: ours alone")
    parser.add_argument("--chips", default="v5e,v6e")
    parser.add_argument("--sizes", default="S,B", help="of DeiT: S, B")
    parser.add_argument("--keep_rates", default="1,0.7,0.5")
    parser.add_argument("--programs", default="logits,gradient")
    parser.add_argument("--batch_size", type=int, default=128)
    flags = parser.parse_args()

    rows = []
    for chip in flags.chips.split(","):
        target = Target(chip)
        for program in flags.programs.split(","):
            for size in flags.sizes.split(","):
                cases = {}
                if flags.big_vision:
                    cases["big_vision"] = big_vision_vit(flags.big_vision, size)
                for rate in map(float, flags.keep_rates.split(",")):
                    cases[f"{rate:g}"] = our_vit(size, rate)
                theirs = None
                for name, (logits, params) in cases.items():
                    start = time.monotonic()
                    found = estimate(target, program, logits, params, flags.batch_size)
                    cost = found.cost and found.cost / SCALE[found.unit]
                    theirs = cost if name == "big_vision" else theirs
                    row = dict(
                        chip=chip, program=program, size=f"{size}/16", model=name, cost=cost,
                        share=cost and theirs and cost / theirs, fits=found.fits,
                        temporaries_mib=(found.temporary_bytes or 0) / 2**20,
                        seconds=time.monotonic() - start,
                    )  # fmt: skip
                    rows.append(row)
                    cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in row.values())
                    print("|", " | ".join(cells), "|", flush=True)
    print(json.dumps(dict(jax=jax.__version__, compiler=target.compiler, results=rows)))


if __name__ == "__main__":
    main()
