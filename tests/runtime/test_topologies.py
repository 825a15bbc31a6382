# SPDX-License-Identifier: Apache-2.0
"""Chips that are not there, with and without their compilers."""

import importlib.util
import os
import subprocess
import sys

import jax
import pytest
from jax.experimental import topologies as jax_topologies

from evit_jax.errors import InputError
from evit_jax.runtime import topologies
from evit_jax.runtime.topologies import CHIPS, absent_devices, chip_of
from tests.support.compilers import needs_cuda_compiler, needs_tpu_compiler


@pytest.fixture
def no_environment(monkeypatch):
    """What is written into the environment ends with the test."""
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.fixture
def nothing_installed(monkeypatch, no_environment):
    os.environ.pop("TPU_LIBRARY_PATH", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v5e", 'v5e needs the compiler of TPUs: pip install "evit_jax[tpu]"'),
        ("v6e:4x4", 'v6e:4x4 needs the compiler of TPUs: pip install "evit_jax[tpu]"'),
        ("h200", 'h200 needs the compiler of GPUs: pip install "evit_jax[cuda]", or without'),
        ("h200", f"jax-cuda13-pjrt=={jax.__version__}"),
    ],
)
def test_without_a_compiler_one_line_says_what_to_install(name, text, nothing_installed):
    with pytest.raises(InputError) as error:
        absent_devices(name)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("v5", "unknown chip 'v5'; did you mean"), ("h200:2", "only TPUs come in slices"),
     ("a100:1x1", "unknown chip 'a100'")],
)  # fmt: skip
def test_what_is_no_chip_is_refused(name, text):
    with pytest.raises(InputError) as error:
        absent_devices(name)
    assert text in str(error.value)


def test_a_plugin_that_jax_did_not_start_is_explained(monkeypatch, no_environment):
    def missing(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(topologies, "check_installed", lambda *_: None)
    monkeypatch.setattr(jax_topologies, "get_topology_desc", missing)
    with pytest.raises(InputError, match=r"JAX did not start its CUDA plugin.*JAX_PLATFORMS=cpu"):
        absent_devices("h100")


def test_compilers_are_freed_only_where_their_chips_are_not(monkeypatch, no_environment, tmp_path):
    gpu = tmp_path / "nvidia0"
    gpu.touch()
    files = dict(cuda=(str(gpu),), tpu=(str(tmp_path / "accel*"),))
    monkeypatch.setattr(topologies, "DEVICE_FILES", files)
    names = ("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    for name in names:
        os.environ.pop(name, None)
    topologies.free_compilers()
    assert [os.environ.get(name) for name in names] == [None, "1"]
    gpu.rename(tmp_path / "accel7")
    del os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"]
    topologies.free_compilers()
    assert [os.environ.get(name) for name in names] == ["1", None]


def test_memory_is_what_the_chips_have():
    assert {name: round(chip.memory_bytes / 1e9) for name, chip in CHIPS.items()} == dict(
        v5e=17, v6e=34, v5p=102, h100=80, h200=141
    )
    assert chip_of("v5e:16x16") is CHIPS["v5e"]
    assert "memory_bandwidth: 3350000000000 l2_cache_size: 52428800" in CHIPS["h100"].topology


@needs_tpu_compiler
def test_a_slice_has_all_its_chips_and_wrong_ones_are_refused():
    assert len(absent_devices("v5e")) == 1
    assert len(absent_devices("v6e:4x4")) == 16
    assert absent_devices("v5p")[0].platform == "tpu"
    with pytest.raises(InputError, match=r"v5e:3x7 is no slice .* v5e alone is one chip"):
        absent_devices("v5e:3x7")


SCRIPT = """
import jax
from evit_jax.runtime.topologies import absent_devices
print([absent_devices(name)[0].device_kind for name in NAMES], jax.default_backend())
"""


@needs_tpu_compiler
@needs_cuda_compiler
@pytest.mark.parametrize("names", [["v5e", "h200"], ["h100", "v6e"]])
def test_both_compilers_work_in_one_process_without_a_word(names):
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    script = SCRIPT.replace("NAMES", str(names))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    kinds = dict(v5e="TPU v5 lite", v6e="TPU v6 lite", h100="NVIDIA H100", h200="NVIDIA H200")
    assert done.stdout == f"{[kinds[name] for name in names]} cpu\n"
    assert done.stderr == ""
