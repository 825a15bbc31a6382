# SPDX-License-Identifier: Apache-2.0
"""Plan files: a method and its token counts per block, as JSON.

A JSON object with `reducer`, a spec such as "tome" or {"name": "ward", "floor": 0.1}, and `tokens`,
a count, a list of counts, or null for each block. Whatever else is in it is for people.
"""

import json
from pathlib import Path

from evit_jax.errors import InputError
from evit_jax.storage import read


def read_plan(path: str | Path) -> dict:
    """{"reducer": ..., "tokens": ...} of a plan file, arguments of `create_model`.

    Raises:
      InputError: no such file, or something else in it.
    """
    try:
        content = json.loads(read(path))
        return dict(reducer=content["reducer"], tokens=as_counts(content["tokens"]))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError):
        raise InputError(
            f'{path} is no plan: it has to be a JSON object such as {{"reducer": "evit", '
            '"tokens": [null, 140, 100]}, with a count or null for each block; '
            "the calibrate tool writes one"
        ) from None


def as_counts(tokens: list) -> tuple:
    """Counts with tuples for lists."""
    return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in tokens)
