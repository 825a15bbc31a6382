# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept on disk, so that the next run of the same program starts at once.

JAX writes and finds them by itself: it runs what lies in its compilation cache under the right
name, and one program is one file, named by a hash of all that went into it (the program, versions,
compiler flags, kind and features of the processor or accelerator). Left to do here is to choose a
folder that nobody else can write to, and to keep it whole and small.

JAX_COMPILATION_CACHE_DIR=FOLDER takes another folder, JAX_ENABLE_COMPILATION_CACHE=false none.
"""

import contextlib
import os
import stat
import sys
import warnings
import zlib
from pathlib import Path

import jax

LIMIT = 2 * 2**30  # bytes
ZSTANDARD = bytes.fromhex("28b52ffd")  # how its data begin


def turn_on() -> None:
    """Has JAX keep programs in a private folder of this user; call it before one is compiled.

    A folder that JAX was told to use by other means stays. Where none can be had, one line says
    so, and programs are compiled anew in every run.
    """
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    try:
        folder = private_folder()
        tidy(folder)
    except (OSError, RuntimeError) as error:
        jax.config.update("jax_enable_compilation_cache", False)
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A program that cannot be read, as another run is just writing it, is compiled; one that cannot
    # be written is not kept. Neither concerns the user.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")


def private_folder() -> Path:
    """Where programs are kept, made if need be.

    Raises:
      OSError: it cannot be made or written to, or somebody else could put a program there.
      RuntimeError: the user has no home.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~", ".cache").expanduser())
    folder = cache / "evit_jax" / "programs"
    folder.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for part in (folder.parent, folder):
        part.mkdir(mode=0o700, exist_ok=True)
    folder = folder.resolve()
    user = getattr(os, "getuid", lambda: -1)()
    for part in (folder, *folder.parents):
        status = part.stat()
        # What is in a sticky folder, such as that for temporary files, only its owner can replace.
        shared = status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX
        if shared or status.st_uid not in (user, 0):
            raise PermissionError(
                f"others may change {part}; take that right away, or choose a folder of your own "
                "with JAX_COMPILATION_CACHE_DIR"
            )
    if folder.stat().st_uid != user or not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} cannot be written to")
    return folder


def tidy(folder: Path, *, limit: int = LIMIT) -> None:
    """Removes programs that are not whole, then those not used for longest until `limit` holds.

    JAX writes a file in place and never again, so what a killed run or a full disk left of one
    would stay. A file is looked at once: a whole one loses the right to be written.
    """
    used = {}
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another run tidies up as well
            status = path.stat()
            if status.st_mode & stat.S_IWUSR:
                if not is_whole(path.read_bytes()):
                    path.unlink()
                    continue
                path.chmod(stat.S_IRUSR)
            used[path] = max(status.st_atime, status.st_mtime), status.st_size
    total = sum(size for _, size in used.values())
    for path in sorted(used, key=used.get):
        if total <= limit:
            break
        total -= used[path][1]
        with contextlib.suppress(OSError):
            path.unlink()


def is_whole(content: bytes) -> bool:
    """Whether a program's file can be unpacked.

    Where the package zstandard is installed JAX packs with it; that is taken to be whole.
    """
    if content.startswith(ZSTANDARD):
        return True
    try:
        zlib.decompress(content)
    except zlib.error:
        return False
    return True
