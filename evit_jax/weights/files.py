# SPDX-License-Identifier: Apache-2.0
"""Weight files from elsewhere as NumPy arrays, and safetensors files for elsewhere.

Nothing in a file is trusted: no code of it runs, no size in it is believed before it is compared
with the file's own, and whatever is wrong ends in one InputError.
"""

import io
import json
import math
import os
import re
import struct
import uuid
import zipfile
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from evit_jax.errors import InputError
from evit_jax.weights.torch_pickle import MAX_DIMENSIONS, Machine, Refused, Tensor

INDEX = "model.safetensors.index.json"
# Where state dicts are; the average of weights before these, as timm and T2T-ViT evaluate it.
NESTED = ("model", "state_dict_ema", "state_dict", "module", "encoder", "teacher")
MAX_DIRECTORY = 16 << 20  # bytes of a zip file's directory; a thousand tensors need 100 KB
MAX_UNPACKED = 16 << 30
MAX_RATIO = 1000
TORCH_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")  # LONG1 0x1950a86a20f9469cfc6c
NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|])([biuf][1248])', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,18}, ?)*(?:\d{1,18})?)\),? ?\} *\n"
)
DAMAGED = (ValueError, OSError, EOFError, RuntimeError, MemoryError, OverflowError, struct.error,
           zipfile.BadZipFile, zlib.error, SafetensorError)  # fmt: skip


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """A .safetensors, PyTorch (.pth, .pt, .bin) or .npz file's tensors by name, read-only.

    The content decides which it is. Of a PyTorch training checkpoint it is the state dict under
    `model`, else `state_dict_ema`, `state_dict`, `module`, `encoder` or `teacher`, else the whole.
    Of a folder it is model.safetensors, or the parts that model.safetensors.index.json lists.
    """
    path = Path(path)
    try:
        tensors = _read_folder(path) if path.is_dir() else _read(path)
        if not tensors:
            raise Refused("there are no tensors in it")
        return {name: _finished(array) for name, array in tensors.items()}
    except FileNotFoundError as error:
        missing = error.filename or path
        raise InputError(f"the weight file {missing} does not exist: check the path") from error
    except Refused as error:
        raise InputError(f"{path} cannot be used as weights: {error}") from error
    except DAMAGED as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise InputError(
            f"{path} cannot be read as weights ({reason}): check that it is a whole .safetensors, "
            ".pth or .npz file, or get it again"
        ) from error


def write_safetensors(path: str | os.PathLike, tensors: dict[str, np.ndarray]) -> None:
    """Writes `tensors` as a .safetensors file, whole or not at all."""
    path = Path(path)
    if not tensors:
        raise InputError(f"there are no tensors to write to {path}")
    ready = {}
    for name, array in tensors.items():
        if not isinstance(name, str) or not name.isprintable() or name == "__metadata__":
            raise InputError(f"{path}: a tensor cannot be called {name!r}; use another text")
        array = np.asarray(array, order="C")
        plain = array.dtype.kind in "biuf" and array.itemsize <= 8
        if not plain and array.dtype.name != "bfloat16":
            raise InputError(
                f"{path}: {name!r} is of dtype {array.dtype}, which safetensors cannot hold; "
                "convert it to float32 first"
            )
        ready[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with open(temporary, "xb") as file:  # for the usual permissions: the library's are narrower
        mode = os.fstat(file.fileno()).st_mode
    try:
        safetensors.numpy.save_file(ready, temporary)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    if not path.is_file():  # a pipe would wait for ever
        raise Refused("it is not a file")
    with open(path, "rb") as file:
        start = file.read(64)
    if start.startswith((b"version https://git-lfs", b"<html", b"<!doc", b"<!DOC")):
        raise Refused("it is a Git LFS pointer or a web page: get the file itself")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return safetensors.numpy.load_file(path)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(path, size)
    if TORCH_MAGIC in start:
        return _read_legacy(path.read_bytes())
    if start.startswith(b"\x80"):
        raise Refused("it is a Python pickle, but not one that torch.save wrote")
    raise Refused("it is neither a .safetensors nor a PyTorch nor an .npz file")


def _read_folder(path: Path) -> dict[str, np.ndarray]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _read(path / name)
    index = path / INDEX
    if not index.is_file():
        raise Refused(f"it is not a file, and as a folder has no model.safetensors or {INDEX}")
    try:
        parts = json.loads(index.read_text())["weight_map"]
        names = sorted({Path(part).name for part in parts.values()})  # never outside the folder
    except (KeyError, TypeError, AttributeError) as error:
        raise Refused(f"its {INDEX} is damaged: get it again") from error
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        tensors |= _read(path / name)
    if missing := parts.keys() - tensors.keys():
        raise Refused(f"its parts lack {min(missing)!r}, which {INDEX} lists: get them again")
    return tensors


def _finished(array: np.ndarray) -> np.ndarray:
    """Read-only, in C order and the machine's byte order, aligned, and with true booleans."""
    if array.dtype == np.bool_:
        array = array.view(np.uint8) != 0  # a damaged file's 2 is neither True nor False
    array = np.require(array, array.dtype.newbyteorder("="), "CA")
    array.flags.writeable = False
    return array


class _Guarded(io.BufferedReader):
    """A file that refuses to read more than `limit` at once, as zipfile does for directories."""

    limit: int | None = MAX_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        if self.limit is not None and size is not None and size > self.limit:
            raise Refused("its zip directory is far too large for weights")
        return super().read(size)


def _read_zip(path: Path, size: int) -> dict[str, np.ndarray]:
    with _Guarded(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        file.limit = None
        pickles = [name for name in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) == 1:
            return _read_torch_zip(archive, pickles[0].removesuffix("data.pkl"), size)
        if archive.namelist() and all(name.endswith(".npy") for name in archive.namelist()):
            return _read_npz(archive, size)
    raise Refused("it is a zip file, but neither PyTorch nor NumPy wrote it")


def _read_torch_zip(archive: zipfile.ZipFile, root: str, size: int) -> dict[str, np.ndarray]:
    members = archive.infolist()
    if any(info.compress_type or info.compress_size != info.file_size for info in members):
        raise Refused("it is compressed, which PyTorch never does: get it as PyTorch wrote it")
    if sum(info.file_size for info in members) > size:
        raise Refused(f"its parts are declared to be larger than the whole of {size} bytes")
    names = set(archive.namelist())
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise Refused("it was written on a big-endian machine: save it again on another")
    tensors = _state_dict(Machine(archive.read(f"{root}data.pkl")).load(), size)
    contents = {}
    for storage in {tensor.storage for tensor in tensors.values()}:
        name = f"{root}data/{storage.key}"
        there = archive.getinfo(name).file_size if name in names else 0
        if there != storage.count * storage.dtype.itemsize:
            raise Refused(f"{name[:100]!r} in it has {there} bytes, not {storage.count} elements")
        contents[storage] = archive.read(name) if there else b""
    return {name: tensor.read(contents[tensor.storage]) for name, tensor in tensors.items()}


def _read_legacy(data: bytes) -> dict[str, np.ndarray]:
    """Before PyTorch 1.6: five pickles, then each storage as its length and its bytes."""
    machine = Machine(data)
    _, version, system = machine.load(), machine.load(), machine.load()
    if version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise Refused("it is of an unknown version or from a big-endian machine: save it again")
    tensors, keys = _state_dict(machine.load(), len(data)), machine.load()
    contents, view = {}, memoryview(data)
    for key in keys if isinstance(keys, list) else ():
        storage = machine.storages.get(key) if isinstance(key, str) else None
        if storage is None or machine.number("<q") != storage.count:
            raise Refused("it is damaged (its list of storages): get it again")
        end = machine.position + storage.count * storage.dtype.itemsize
        if end > len(data):
            raise Refused("it is cut off or damaged: get it again")
        contents[storage], machine.position = view[machine.position : end], end
    if any(tensor.storage not in contents for tensor in tensors.values()):
        raise Refused("it is damaged (a storage is missing): get it again")
    return {name: tensor.read(contents[tensor.storage]) for name, tensor in tensors.items()}


def _state_dict(value, size: int) -> dict[str, Tensor]:
    """The tensors of the state dict in an unpickled checkpoint of a file of `size` bytes."""
    if isinstance(value, Tensor):  # saved by itself, as label maps are
        value = {"tensor": value}
    if isinstance(value, dict):
        nested = (value[key] for key in NESTED if key in value)
        value = next((entry for entry in nested if isinstance(entry, dict)), value)
    entries = value if isinstance(value, dict) else {}
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
    if not tensors:
        keys = ", ".join(repr(name[:40]) for name in list(entries)[:6]) or "nothing"
        raise Refused(f"it holds no state dict of tensors at its top, in `model` or `state_dict`, "
                      f"but {keys}: save the state_dict() alone")  # fmt: skip
    # Tensors may share memory or repeat it, so nothing but this bounds what they unfold to.
    if sum(tensor.nbytes for tensor in tensors.values()) > 4 * size + (64 << 20):
        raise Refused(f"its tensors would unfold to far more than its {size} bytes")
    return tensors


def _read_npz(archive: zipfile.ZipFile, size: int) -> dict[str, np.ndarray]:
    members = archive.infolist()
    if not {info.compress_type for info in members} <= {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise Refused("it is compressed in a way that NumPy does not use")
    total = sum(info.file_size for info in members)
    if total > min(MAX_UNPACKED, MAX_RATIO * size):
        raise Refused(f"it would unpack from {size} to {total} bytes, far too many for weights")
    tensors = {}
    for info in members:
        with archive.open(info) as member:
            # With its length given, no more than that is unpacked, and the checksum is checked.
            tensors[info.filename.removesuffix(".npy")] = _read_npy(
                member.read(info.file_size), info.filename
            )
    return tensors


def _read_npy(content: bytes, name: str) -> np.ndarray:
    """An array in NumPy's format, with only the headers that NumPy writes for plain numbers."""
    code, start = ("<H", 10) if content[6:7] == b"\x01" else ("<I", 12)
    if content[:6] != b"\x93NUMPY" or len(content) < start:
        raise Refused(f"{name[:100]!r} in it is no NumPy array")
    begin = start + struct.unpack_from(code, content, 8)[0]
    header = NPY_HEADER.fullmatch(content[start : min(begin, start + 10_000)])
    if not header:
        raise Refused(f"{name[:100]!r} in it is not an array of plain numbers: save it as float32")
    order, kind, fortran, sides = (group.decode() for group in header.groups())
    try:
        dtype = np.dtype(order + kind)
    except TypeError as error:
        raise Refused(f"{name[:100]!r} in it has the unknown dtype {kind!r}") from error
    shape = tuple(int(side) for side in sides.replace(" ", "").split(",") if side)
    there = len(content) - begin
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) * dtype.itemsize != there:
        raise Refused(f"{name[:100]!r} in it has {there} bytes of data, which is not its shape")
    if not there:
        if math.prod(max(side, 1) for side in shape) >= 2**56:
            raise Refused(f"{name[:100]!r} in it has an impossible shape")
        return np.zeros(shape, dtype)
    array = np.frombuffer(content, dtype, offset=begin)
    return array.reshape(shape, order="F" if fortran == "True" else "C")
