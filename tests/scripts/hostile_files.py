# SPDX-License-Identifier: Apache-2.0
"""Weight files built by hand, byte for byte, as a hostile writer would, and what to ask of them."""

import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.weights.files import read_tensors


def refused(path, text):
    """Asserts one InputError of one line that names the file, at little cost in memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=text) as caught:
            read_tensors(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if os.path.isfile(path):
        assert peak < (20 << 20) + 5 * os.path.getsize(path)


def same(first, second):
    assert set(first) == set(second)
    for name, array in first.items():
        assert (array.dtype, array.shape) == (second[name].dtype, second[name].shape), name
        assert array.tobytes() == second[name].tobytes(), name


def name(full):
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def text(string):
    return b"X" + struct.pack("<I", len(string)) + string.encode()


def number(value):
    content = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def together(*items):
    return b"(" + b"".join(items) + b"t"


def storage(kind="torch.FloatStorage", key="0", count=4):
    return together(text("storage"), name(kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(offset=0, shape=(4,), strides=(1,), **options):
    sides, steps = (together(*map(number, numbers)) for numbers in (shape, strides))
    rest = (number(offset), sides, steps, b"\x89", b"N")
    return name("torch._utils._rebuild_tensor_v2") + together(storage(**options), *rest) + b"R"


def state(*values):
    entries = (text(f"w{index}") + value for index, value in enumerate(values))
    return b"\x80\x02}(" + b"".join(entries) + b"u."


VALUES = np.arange(4, dtype=np.float32)
BYTES = VALUES.tobytes()


def torch_zip(path, program, members=None, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", program)
        for member, content in ({"data/0": BYTES} | (members or {})).items():
            archive.writestr(f"x/{member}", content)
    return path


def legacy(path, program, tail=b""):
    start = b"\x80\x02\x8a\x0a" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
    system = b"\x80\x02}" + text("little_endian") + b"\x88s."
    path.write_bytes(start + b"\x80\x02M\xe9\x03." + system + program + tail)
    return path


LEGACY_TAIL = b"\x80\x02](" + text("0") + b"e." + struct.pack("<q", 4) + BYTES


def npy(descr="'<f4'", shape="(4,)", data=BYTES):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def npz(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("w.npy", content)
    return path


def safe(path, dtype="F32", shape=(4,), offsets=(0, 16), data=BYTES, length=None):
    header = f'{{"w":{{"dtype":"{dtype}","shape":{list(shape)},"data_offsets":{list(offsets)}}}}}'
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header.encode() + data)
    return path
