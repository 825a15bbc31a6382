# SPDX-License-Identifier: Apache-2.0
"""How files are read and written, whole or not at all."""

import os
from pathlib import Path

from evit_jax.errors import InputError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that is never seen half written, whatever kills the process."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path) -> bytes:
    """A file's content."""
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return path.read_bytes()
