# SPDX-License-Identifier: Apache-2.0
"""StableHLO by `jax.export`: one file for several platforms, which needs JAX alone to run.

The choice of a form by platform (runtime/forms.py) is in the file: where it runs on a TPU, it runs
as the model does on a TPU. Compiler hints for layouts are not (runtime/layouts.py).
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from evit_jax.errors import InputError, check_names
from evit_jax.runtime.parallel import portable
from evit_jax.storage import read, write_whole

PLATFORMS = ("cpu", "cuda", "tpu")


def check_installed() -> None:
    """Raises InputError where what jax.export writes files with is missing."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise InputError('stablehlo needs the extra "export": pip install "evit_jax[export]"')


def write(
    path: Path,
    function: Callable[[jax.Array], jax.Array],
    image_size: tuple[int, int],
    *,
    batch: int | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes images (B, height, width, 3) float32 -> an array, with its constants, to a file.

    Args:
      batch: B; None: any, 0 excluded.
      platforms: where it can run, of "cpu", "cuda", "rocm" and "tpu".

    Raises:
      InputError: the extra "export" is missing, or an unknown platform.
    """
    check_installed()
    check_names("platform", platforms, ("cpu", "cuda", "rocm", "tpu"))
    images = batch or export.symbolic_shape("batch")[0]
    shape = jax.ShapeDtypeStruct((images, *image_size, 3), jnp.float32)
    exported = export.export(portable(function), platforms=list(platforms))(shape)
    write_whole(path, exported.serialize())


def load(path: str | Path) -> Callable[[np.ndarray], jax.Array]:
    """The function in a file that `write` made: images (B, height, width, 3) float32 -> an array.

    Raises:
      InputError: the extra "export" is missing, or the file is something else, or of a newer JAX.
    """
    check_installed()
    content = bytearray(read(path))
    try:
        return export.deserialize(content).call
    except Exception as error:  # of flatbuffers, of MLIR, or of JAX's own checks
        raise InputError(
            f"{path} is no exported model that this JAX ({jax.__version__}) can read; one of a "
            f"newer JAX needs that version: {' '.join(str(error).split())[:200]}"
        ) from error
