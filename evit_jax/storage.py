# SPDX-License-Identifier: Apache-2.0
"""How files are read and written, whole or not at all, on disks and in buckets (gs://).

A bucket holds objects: one appears whole, under its name, when its upload is complete, and can
neither be renamed nor appended to. Access is etils' epath over gcsfs, the extra `gcs`.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

from evit_jax.errors import InputError

BUCKET = "gs://"


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket and not on a disk."""
    return str(path).startswith(BUCKET)


def as_path(path: str | os.PathLike) -> Path:
    """A path on a disk, made absolute, or one in a bucket, with pathlib's methods.

    Raises:
      InputError: a bucket, and the extra for it is missing.
    """
    if not in_bucket(path):
        return Path(path).expanduser().absolute()
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f'{path} needs the extra "gcs": pip install "evit_jax[gcs]"')
    from etils import epath

    return epath.Path(str(path))


@contextlib.contextmanager
def explained(path: str | os.PathLike) -> Iterator[None]:
    """Turns what a bucket answers into one line; a disk's errors stay OSErrors, which say enough.

    Raises:
      InputError: anything that goes wrong with a bucket.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # gcsfs, aiohttp and Google's libraries raise many kinds
        if not in_bucket(path):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{path} cannot be used ({type(error).__name__}: {reason}); check that the bucket "
            "exists and that this machine's account may read and write it, then rerun the same "
            "command: what is there stays"
        ) from error


def write_whole(path: str | os.PathLike, content: str | bytes) -> None:
    """Writes a file that is never seen half written, whatever kills the process."""
    path = as_path(path)
    content = content.encode() if isinstance(content, str) else content
    if in_bucket(path):
        with explained(path):
            path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike) -> bytes:
    """A file's content; raises InputError where there is none."""
    path = as_path(path)
    with explained(path):
        if not path.is_file():
            raise InputError(f"{path} is not a file")
        return path.read_bytes()


class Lines:
    """A text file that grows by lines; each is there for good when `append` returns."""

    def __init__(self, path: Path, lines: list[str]):
        """The file begins anew with these lines, none of which ends in a newline."""
        self.path, self.lines = path, lines
        if lines or not in_bucket(path):
            write_whole(path, "".join(line + "\n" for line in lines))
        if not in_bucket(path):
            self.file = open(path, "a")  # noqa: SIM115  lives as long as this

    def append(self, line: str) -> None:
        """Adds a line; a bucket gets the whole file again, as nothing can be added to an object."""
        if in_bucket(self.path):
            self.lines.append(line)
            write_whole(self.path, "".join(line + "\n" for line in self.lines))
            return
        self.file.write(line + "\n")
        self.file.flush()

    def close(self) -> None:
        if not in_bucket(self.path):
            self.file.close()


def upload(folder: Path, target: Path) -> None:
    """Copies the files of a local folder into one in a bucket, each whole."""
    for file in sorted(folder.iterdir()):
        write_whole(target / file.name, file.read_bytes())
