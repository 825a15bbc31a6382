# SPDX-License-Identifier: Apache-2.0
"""Weight files that lie or attack are refused by name; nothing runs, and little is allocated."""

import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.weights.files import read_tensors
from tests.scripts.hostile_files import (
    BYTES,
    LEGACY_TAIL,
    VALUES,
    legacy,
    name,
    npy,
    npz,
    number,
    refused,
    safe,
    same,
    state,
    storage,
    tensor,
    text,
    together,
    torch_zip,
)

MEGABYTE = 1 << 20


class Attack:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_in_a_file_is_refused_by_name_and_leaves_no_trace(tmp_path, protocol):
    trace = tmp_path / "trace"
    program = pickle.dumps({"model": {}, "x": Attack(trace)}, protocol=protocol)
    asks = r"asks for 'posix.system'.*nothing was run"
    refused(torch_zip(tmp_path / "x.pth", program), asks)
    refused(legacy(tmp_path / "x.pt", program, LEGACY_TAIL), asks)
    (tmp_path / "x.bin").write_bytes(program)
    refused(tmp_path / "x.bin", "not one that torch.save wrote")
    np.savez(tmp_path / "x.npz", w=np.array([Attack(trace)]))
    refused(tmp_path / "x.npz", "'w.npy' in it is not an array of plain numbers")
    assert not trace.exists()
    pickle.loads(program)  # the attack is a real one
    assert trace.exists()


@pytest.mark.parametrize(
    "full",
    ["torch.load", "torch.hub.load", "torch.storage._load_from_bytes", "builtins.eval",
     "builtins.getattr", "collections.namedtuple", "torch._utils._rebuild_tensor_v2.__globals__",
     "numpy.load", "numpy.core.multiarray.fromfile", "torch.FloatStorage.__reduce__", "evil\r.x"],
)  # fmt: skip
def test_other_globals_are_refused_by_name(tmp_path, full):
    module, _, last = full.rpartition(".")
    for ask in (name(full), text(module) + text(last) + b"\x93"):
        program = state(ask + b"(" + text("x") + b"tR", tensor())
        refused(torch_zip(tmp_path / "x.pth", program), "asks for '.*nothing was run")


def test_torchscript_programs_are_named(tmp_path):
    program = state(name("__torch__.Net") + b")\x81")
    refused(torch_zip(tmp_path / "x.pth", program), "is a TorchScript program")


def test_allowed_names_do_nothing_even_when_called_strangely(tmp_path):
    inert = [
        name("numpy.ndarray") + together(together(number(2**40))) + b"R",
        name("builtins.bytearray") + together(number(2**60)) + b"R",
        name("_codecs.encode") + together(text("x"), text("../../evil")) + b"R",
        name("pathlib.PosixPath") + together(text("/etc")) + b"R",
        name("argparse.Namespace") + b")\x81}" + text("__class__") + name("builtins.set") + b"sb",
        name("collections.OrderedDict") + b")R}" + text("items") + b"Nsb",
        b"}" + number(1) + tensor() + b"s",
    ]
    tensors = read_tensors(torch_zip(tmp_path / "x.pth", state(*inert, tensor())))
    same(tensors, {f"w{len(inert)}": VALUES})
    rebuild = name("torch._utils._rebuild_tensor_v2")
    for strange in (
        rebuild + together(text("x"), number(0), b")", b")", b"N", b"N") + b"R",
        rebuild + b")R",
        rebuild + b"NR",
        rebuild + b")\x81",
        name("torch._utils._rebuild_parameter") + together(text("x"), b"\x89", b"N") + b"R",
        name("torch.Size") + together(number(2**60)) + b"R",
        name("torch.FloatStorage") + together(number(2**60)) + b"R",
        name("collections.OrderedDict") + together(b"]") + b"R",
        text("x") + b")R",
        b"NQ",
        b")Q",
        together(text("module"), *[b"N"] * 4) + b"Q",
        storage()[:-2] + text("a view of a storage") + b"tQ",
    ):
        path = torch_zip(tmp_path / "x.pth", state(strange, tensor()))
        refused(path, "no PyTorch file|no usable storage")


@pytest.mark.parametrize(
    "tensor_options",
    [
        dict(offset=1),
        dict(offset=-1),
        dict(offset=2**70),
        dict(offset=4, shape=()),
        dict(shape=(5,)),
        dict(shape=(-4,)),
        dict(shape=(2, 2), strides=(1,)),
        dict(shape=(2, 2), strides=(3, 1)),
        dict(shape=(4,), strides=(-1,)),
        dict(shape=(2,), strides=(2**61,)),
        dict(shape=(2**40, 2**40), strides=(0, 0)),
        dict(shape=(0, 2**61), strides=(1, 1)),
        dict(shape=(1,) * 40, strides=(1,) * 40),
        dict(count=3),
        dict(count=5),
        dict(count=-4),
        dict(count=2**62),
        dict(kind="torch.DoubleStorage"),
        dict(kind="torch.Size"),
        dict(key="1"),
        dict(key="../x"),
    ],
    ids=str,
)
def test_tensors_outside_their_storage_are_refused(tmp_path, tensor_options):
    assert read_tensors(torch_zip(tmp_path / "good.pth", state(tensor())))
    assert read_tensors(legacy(tmp_path / "good.pt", state(tensor()), LEGACY_TAIL))
    program = state(tensor(**tensor_options))
    reasons = "reaches element|no usable|impossible|has .* bytes, not|unknown kind"
    refused(torch_zip(tmp_path / "x.pth", program), reasons)
    refused(legacy(tmp_path / "x.pt", program, LEGACY_TAIL), f"{reasons}|damaged|cut off")


def test_one_storage_has_one_type(tmp_path):
    program = state(tensor(), tensor(kind="torch.IntStorage"))
    refused(torch_zip(tmp_path / "x.pth", program), "two types")


def test_views_cannot_unfold_without_bound(tmp_path):
    program = state(tensor(shape=(2**34,), strides=(0,)))
    refused(torch_zip(tmp_path / "x.pth", program), "unfold to far more")
    program = state(*[tensor(shape=(2**20,), strides=(0,))] * 50)
    refused(torch_zip(tmp_path / "x.pth", program), "unfold to far more")
    tensors = read_tensors(torch_zip(tmp_path / "x.pth", state(tensor(3, (1000,), (0,)))))
    same(tensors, {"w0": np.full(1000, 3, np.float32)})


HUGE = b"\xff" * 7 + b"\x7f"


@pytest.mark.parametrize(
    "operation",
    [b"\x8e" + HUGE, b"\x96" + HUGE, b"\x8d" + HUGE, b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\xff",
     b"X\xff\xff\xff\xff", b"T\xff\xff\xff\xff", b"h\x09", b"j\xff\xff\xff\xff", b"0" * 9,
     b"t", b"\x87", b"R", b"s", b"u", b"X\x01\x00\x00\x00\xff", b"c" + b"x" * 1000, b"F1\n", b"i",
     b"o", b"P0\n", b"\x82\x01", b"\x97", b"\xff"],
)  # fmt: skip
def test_damaged_operations_are_refused_without_memory(tmp_path, operation):
    path = torch_zip(tmp_path / "x.pth", b"\x80\x02" + operation + state(tensor())[2:])
    refused(path, "damaged")


def test_hostile_pickles_that_fill_memory_or_recurse_cost_little(tmp_path):
    far = tensor() + b"r\xff\xff\xff\xff"  # Python's own machine would make room for 2**32 entries
    nested = b")" + b"\x85" * 200_000
    doubled = b")" + b"2\x86" * 200  # as a key, Python would hash 2**200 parts
    keys = b"}(" + nested + b"N" + doubled + b"Nu"
    tensors = read_tensors(torch_zip(tmp_path / "x.pth", state(far, nested, keys)))
    same(tensors, {"w0": VALUES})


def test_endless_pickles_end(tmp_path):
    path = torch_zip(tmp_path / "x.pth", b"\x80\x02" + b"N0" * 1_000_000 + b".")
    with pytest.raises(InputError, match="far too long"):
        read_tensors(path)


def test_zip_files_that_are_not_as_torch_writes_them_are_refused(tmp_path):
    path, program = tmp_path / "x.pth", state(tensor())
    refused(torch_zip(path, program, compression=zipfile.ZIP_DEFLATED), "is compressed")
    refused(torch_zip(path, program, {"byteorder": b"big"}), "big-endian machine")
    refused(torch_zip(path, program, {"data/0": b"123"}), "has 3 bytes, not 4 elements")
    torch_zip(path, program)
    content = bytearray(path.read_bytes())
    content[content.index(BYTES)] ^= 1
    path.write_bytes(content)
    refused(path, "CRC")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    refused(path, "neither PyTorch nor NumPy wrote it")


def test_zip_parts_that_lie_in_each_other_are_refused(tmp_path):
    path = torch_zip(tmp_path / "x.pth", state(tensor()), {"data/1": bytes(10_000)})
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    count, size = struct.unpack_from("<HI", content, len(content) - 12)
    entry = content[content.rindex(b"PK\x01\x02") : directory + size]
    more = content[directory : directory + size] + entry * 50
    end = struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", 0, 0, count + 50, count + 50, len(more), directory, 0
    )
    path.write_bytes(content[:directory] + more + end)
    refused(path, "larger than the whole")


def test_zip_directories_of_absurd_size_are_refused(tmp_path):
    size, path = 20 * MEGABYTE, tmp_path / "x.pth"
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 9, 9, size, 4, 0)
    path.write_bytes(b"PK\x03\x04" + bytes(size) + end)
    refused(path, "directory is far too large")


def test_legacy_files_with_a_wrong_list_of_storages_are_refused(tmp_path):
    path, program = tmp_path / "x.pt", state(tensor())
    for tail, reason in (
        (b"\x80\x02].", "storage is missing"),
        (b"\x80\x02N.", "storage is missing"),
        (LEGACY_TAIL.replace(text("0"), text("1")), "list of storages"),
        (LEGACY_TAIL.replace(text("0"), b"}"), "list of storages"),
        (LEGACY_TAIL.replace(struct.pack("<q", 4), struct.pack("<q", -4)), "list of storages"),
        (LEGACY_TAIL.replace(struct.pack("<q", 4), struct.pack("<q", 3)), "list of storages"),
        (LEGACY_TAIL[:-1], "cut off"),
    ):
        refused(legacy(path, program, tail), reason)


def test_zip_bombs_are_refused(tmp_path):
    path = npz(tmp_path / "x.npz", bytes(100 * MEGABYTE), zipfile.ZIP_DEFLATED)
    refused(path, "would unpack from .* far too many")
    content = path.read_bytes()  # now with a lie about its size, which the checksum finds out
    path.write_bytes(content.replace(struct.pack("<I", 100 * MEGABYTE), struct.pack("<I", 1000)))
    refused(path, "CRC")
    refused(npz(path, npy(), zipfile.ZIP_LZMA), "compressed in a way")


@pytest.mark.parametrize(
    "options",
    [dict(shape="(1000000000000,)"), dict(shape="(5,)"), dict(shape="(3,)"), dict(shape="(-4,)"),
     dict(shape="(4,)" * 30), dict(shape="(0, 999999999999999999)", data=b""), dict(shape="4"),
     dict(descr="'|O'"), dict(descr="'<f3'"), dict(descr="'<f1'"), dict(descr="'|V2'"),
     dict(descr="'<U4'"), dict(descr="[('a', '<f4')]"), dict(shape="(" + "1, " * 50 + ")"),
     dict(shape="(" + "1" * 5000), dict(data=b""), dict(shape="(__import__('os').getpid(),)")],
    ids=str,
)  # fmt: skip
def test_numpy_headers_that_lie_are_refused(tmp_path, options):
    assert read_tensors(npz(tmp_path / "good.npz", npy()))
    refused(npz(tmp_path / "x.npz", npy(**options)), "'w.npy' in it")


@pytest.mark.parametrize(
    "options",
    [dict(length=2**63), dict(length=2**40), dict(length=5), dict(dtype="F99"), dict(dtype="F64"),
     dict(shape=(5,)), dict(shape=(-4,)), dict(shape=(2**62, 4)), dict(offsets=(0, 2**62)),
     dict(offsets=(4, 20)), dict(offsets=(16, 0)), dict(data=b"x")],
    ids=str,
)  # fmt: skip
def test_safetensors_headers_that_lie_are_refused(tmp_path, options):
    assert read_tensors(safe(tmp_path / "good.safetensors"))
    refused(safe(tmp_path / "x.safetensors", **options), "cannot be read as weights")
    refused(safe(tmp_path / "x.bin", **options), "cannot be read as weights")
