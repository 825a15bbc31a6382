# SPDX-License-Identifier: Apache-2.0
"""Weight files of real PyTorch (tests/fixtures/torch, written by torch 2.13), NumPy and our own."""

import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import SafetensorError

from evit_jax.errors import InputError
from evit_jax.weights.files import read_tensors, write_safetensors
from tests.scripts.fuzz_weight_files import FILES, FOLDER, fuzz
from tests.scripts.hostile_files import VALUES, refused, same, state, tensor, text, torch_zip


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("training.pth", "training"),
        ("training_legacy.pth", "training"),
        ("wrapped.bin", "wrapped"),
        ("wrapped_legacy.bin", "wrapped"),
    ],
)
def test_files_of_real_torch_give_its_values(file, expected):
    tensors = read_tensors(FOLDER / file)
    same(tensors, safetensors.numpy.load_file(FOLDER / f"{expected}_expected.safetensors"))
    if expected == "training":
        assert tensors["bfloat16"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(tensors["transposed"], np.arange(24.0).reshape(4, 6).T)
        np.testing.assert_array_equal(tensors["expanded"], [[1.5] * 3, [-2] * 3])
        assert tensors["scalar_inside"].shape == ()
        assert tensors["scalar_inside"] == 5
        assert list(tensors)[:2] == ["proj.weight", "proj.bias"]  # the order of the file
    else:
        assert all(key.startswith("module.") for key in tensors)


def test_a_bare_state_dict_ignores_what_is_no_tensor():
    tensors = read_tensors(FOLDER / "plain.pt")
    same(tensors, {"weight": np.float32([[1, 3], [2, 4]])})


def test_the_content_decides_not_the_extension(tmp_path):
    for file in FILES:
        if file.suffix != ".safetensors":
            (tmp_path / "weights.bin").write_bytes(file.read_bytes())
            same(read_tensors(tmp_path / "weights.bin"), read_tensors(file))
    (tmp_path / "weights.pth").write_bytes((FOLDER / "wrapped_expected.safetensors").read_bytes())
    same(read_tensors(tmp_path / "weights.pth"), read_tensors(FOLDER / "wrapped.bin"))


def test_model_comes_before_state_dict_and_both_before_the_top(tmp_path):
    def inner(index):
        return b"}" + text("w") + tensor(index, (1,)) + b"s"

    both = {"state_dict": inner(1), "top": tensor(3, (1,)), "model": inner(2)}
    for left_out, value in (((), 2), (("model",), 1)):
        entries = b"".join(text(k) + v for k, v in both.items() if k not in left_out)
        tensors = read_tensors(torch_zip(tmp_path / "x.pth", b"\x80\x02}(" + entries + b"u."))
        same(tensors, {"w": np.float32([value])})


def test_arrays_are_read_only_since_some_share_memory():
    for file in FILES:
        for array in read_tensors(file).values():
            assert not array.flags.writeable
            assert array.flags.c_contiguous
            assert array.flags.aligned  # in legacy files the storages lie anywhere


def test_strides_along_sides_of_one_mean_nothing(tmp_path):
    program = state(tensor(shape=(1, 4), strides=(2**61, 1)))
    same(read_tensors(torch_zip(tmp_path / "x.pth", program)), {"w0": VALUES[None]})


def test_npz_files_of_every_plain_kind_are_read(tmp_path):
    arrays = {
        "a/b": np.arange(6, dtype=">f4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.int64(4),
        "empty": np.zeros((0, 3), np.uint8),
        "bool": np.array([True, False]),
        "half": np.float16([1.5]),
    }
    native = {key: np.asarray(a, a.dtype.newbyteorder("="), order="C") for key, a in arrays.items()}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        same(read_tensors(tmp_path / "x.npz"), native)


def test_a_byte_that_is_neither_true_nor_false_becomes_true(tmp_path):
    program = state(tensor(kind="torch.BoolStorage"))
    path = torch_zip(tmp_path / "x.pth", program, {"data/0": b"\x00\x01\x02\xff"})
    same(read_tensors(path), {"w0": np.array([False, True, True, True])})


def test_safetensors_are_written_and_read_back(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "big endian": np.arange(3, dtype=">i4"),
        "scalar": np.array(2, np.float16),
        "empty": np.zeros((0, 2), np.int64),
        "bool": np.array([True, False]),
    }
    write_safetensors(path, tensors)
    expected = {
        key: np.asarray(a, a.dtype.newbyteorder("="), order="C") for key, a in tensors.items()
    }
    same(read_tensors(path), expected)
    same(safetensors.numpy.load_file(path), expected)
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert sorted(file.name for file in tmp_path.iterdir()) == ["usual", "x.safetensors"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"w": VALUES})
    for tensors, error in (
        ({}, "there are no tensors"),
        ({"w": np.array([None])}, "'w' is of dtype object"),
        ({"w": np.array(["a"])}, "'w' is of dtype <U1"),
        ({"w": np.zeros(1, np.complex64)}, "'w' is of dtype complex64"),
        ({"__metadata__": VALUES}, "cannot be called"),
        ({3: VALUES}, "cannot be called"),
        ({"\ud800": VALUES}, "cannot be called"),
    ):
        with pytest.raises(InputError, match=error):
            write_safetensors(path, tensors)
    with pytest.raises(OSError, match="none"):
        write_safetensors(tmp_path / "none" / "x.safetensors", {"w": VALUES})

    def full(tensors, file):
        file.write_bytes(b"half")
        raise SafetensorError("I/O error: no space left")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        write_safetensors(path, {"w": VALUES + 1})
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]
    same(read_tensors(path), {"w": VALUES})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_cut_off_anywhere_are_refused(tmp_path, file):
    content, path = file.read_bytes(), tmp_path / file.name
    for length in {*range(0, len(content), 37), len(content) - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=file.name):
            read_tensors(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither a .safetensors nor"),
        (b"weights", "neither a .safetensors nor"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "web page"),
        (pickle.dumps([1]), "not one that torch.save wrote"),
    ],
)
def test_files_of_another_kind_say_what_they_are(tmp_path, content, reason):
    (tmp_path / "x.pth").write_bytes(content)
    refused(tmp_path / "x.pth", reason)


def test_missing_files_and_folders_are_named(tmp_path):
    refused(tmp_path / "none.pth", "does not exist")
    refused(tmp_path, "is not a file")


def test_a_tensor_saved_by_itself_is_called_tensor(tmp_path):
    path = torch_zip(tmp_path / "x.pt", b"\x80\x02" + tensor() + b".")
    same(read_tensors(path), {"tensor": VALUES})


def test_files_without_tensors_list_what_they_hold(tmp_path):
    path = torch_zip(
        tmp_path / "x.pth", state(b"N", b"K\x01", b"}" + text("deep") + tensor() + b"s")
    )
    refused(path, "no state dict of tensors .* but 'w0', 'w1', 'w2': save the state_dict")
    for program in (b"\x80\x02N.", b"\x80\x02].", b"\x80\x02}."):
        refused(torch_zip(path, program), "no state dict of tensors")
    (tmp_path / "x.safetensors").write_bytes(safetensors.numpy.save({}))
    refused(tmp_path / "x.safetensors", "there are no tensors in it")
    np.savez(tmp_path / "x.npz")
    refused(tmp_path / "x.npz", "cannot be used as weights")


def test_randomly_damaged_files_are_read_or_refused(tmp_path):
    outcomes = fuzz(300, 1, tmp_path)
    assert set(outcomes) == {"read", "refused"}
    assert min(outcomes.values()) > 10
