# SPDX-License-Identifier: Apache-2.0
"""Weights of any supported source -> timm's names as safetensors, for PyTorch or for us.

python -m evit_jax.tools.convert FILE.pth|FILE.safetensors|FILE.npz OUT.safetensors
python -m evit_jax.tools.convert WORKDIR OUT.safetensors     the newest checkpoint of a training run

Of a run, networks that recover tokens (sit:recovery=True) are left out: only training has them.

The last line of standard output is a JSON object with the figures.
"""

import json
import sys
from pathlib import Path

import numpy as np

from evit_jax import cli
from evit_jax.errors import InputError
from evit_jax.storage import as_path, explained
from evit_jax.training.trained import load_run
from evit_jax.weights.files import read_tensors, write_safetensors
from evit_jax.weights.names import of_recovery, tensors_from_params, with_timm_names


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("source", help="weights, or the folder of a model or of a training run")
    parser.add_argument("out", type=Path, help="the safetensors file to write")
    flags = parser.parse_args()
    if flags.out.suffix != ".safetensors":
        raise InputError(f"{flags.out} should end in .safetensors, the format that is written")
    source = as_path(flags.source)
    with explained(source):
        is_run = source.is_dir() and not any(source.glob("*.safetensors"))
    if is_run:
        run = load_run(flags.source)
        tensors = tensors_from_params(run.params, run.model)
        tensors = {name: array for name, array in tensors.items() if not of_recovery(name)}
    else:
        tensors = with_timm_names(read_tensors(flags.source))
    tensors = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    write_safetensors(flags.out, tensors)
    numbers = sum(array.size for array in tensors.values())
    print(f"{len(tensors)} tensors, {numbers:,} numbers -> {flags.out}", file=sys.stderr)
    print(json.dumps(dict(out=str(flags.out), tensors=len(tensors), numbers=numbers)))


if __name__ == "__main__":
    cli.guard(main)
