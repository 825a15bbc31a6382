# SPDX-License-Identifier: Apache-2.0
"""Chips that this machine does not have: their compilers run without them.

A TPU's compiler is libtpu, a GPU's is in JAX's CUDA plugin; both compile on any Linux machine. What
comes out can be read, not run.
"""

import os
from typing import NamedTuple

import jax
from jax.experimental import topologies

from evit_jax.errors import InputError, check_name

GIB = 2**30


class Chip(NamedTuple):
    """A kind of chip that programs can be compiled for."""

    platform: str  # "tpu" or "cuda"
    topology: str  # the smallest slice, as its compiler names it; for a GPU what it is
    memory_bytes: int  # for arguments, results and temporaries


# What XLA asks of a GPU before it compiles for one (its GpuTargetConfigProto in text form).
HOPPER = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 233472 threads_per_core_limit: 2048
core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {l2} clock_rate_ghz: 1.98
device_memory_size: {memory} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 13 }} device_description_str: "{name}"
"""

CHIPS = {
    "v5e": Chip("tpu", "v5e:1x1", 16 * GIB),
    "v6e": Chip("tpu", "v6e:1x1", 32 * GIB),
    "v5p": Chip("tpu", "v5p:1x1x1", 95 * GIB),
    "h200": Chip(
        "cuda",
        HOPPER.format(
            bandwidth=4814 * 10**9, l2=60 * 2**20, memory=141 * 10**9, name="NVIDIA H200"
        ),
        141 * 10**9,
    ),
}


def chip_of(name: str) -> Chip:
    """The chip of a name such as "v5e", or of a slice such as "v5e:4x4".

    Raises:
      InputError: an unknown chip.
    """
    return CHIPS[check_name("chip", name.partition(":")[0], CHIPS)]


def absent_devices(name: str) -> list[jax.Device]:
    """Devices to compile for: one for "v5e" or "h200", all of a slice for "v5e:4x4".

    Raises:
      InputError: an unknown chip or slice, or its compiler is not installed.
    """
    chip = chip_of(name)
    sliced = ":" in name
    if chip.platform == "cuda" and sliced:
        raise InputError(f"{name}: only TPUs come in slices; the chip is {name.partition(':')[0]}")
    try:
        if chip.platform == "tpu":
            find_libtpu()
            return topologies.get_topology_desc(
                platform="tpu", topology_name=name if sliced else chip.topology
            ).devices
        return topologies.get_topology_desc(
            "absent", "cuda", target_config=chip.topology, topology="1x1x1"
        ).devices
    except ModuleNotFoundError as error:
        raise InputError(str(error)) from None  # replaced by the tools branch


def find_libtpu() -> None:
    """Tells JAX where libtpu is, and libtpu that it is on no TPU machine."""
    import libtpu

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else it asks the network for a while
    os.environ.setdefault("TPU_LIBRARY_PATH", libtpu.get_library_path())
