# SPDX-License-Identifier: Apache-2.0
"""Chips that this machine does not have: their compilers run without them.

A TPU's compiler is libtpu, a GPU's is in JAX's CUDA plugin; both compile on any Linux machine. What
comes out can be read, not run.
"""

import glob
import importlib.util
import os
from pathlib import Path
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


def hopper(name: str, *, memory: int, bandwidth: int, l2: int) -> Chip:
    """A GPU with 132 Hopper cores: its memory in bytes, bytes per second and bytes of L2."""
    described = HOPPER.format(name=name, memory=memory, bandwidth=bandwidth, l2=l2)
    return Chip("cuda", described, memory)


CHIPS = {
    "v5e": Chip("tpu", "v5e:1x1", 16 * GIB),
    "v6e": Chip("tpu", "v6e:1x1", 32 * GIB),
    "v5p": Chip("tpu", "v5p:1x1x1", 95 * GIB),
    "h100": hopper("NVIDIA H100", memory=80 * 10**9, bandwidth=3350 * 10**9, l2=50 * 2**20),
    "h200": hopper("NVIDIA H200", memory=141 * 10**9, bandwidth=4814 * 10**9, l2=60 * 2**20),
}
# Files that are there where a chip is: of NVIDIA's driver, in a container and under WSL too, and of
# the kernel's drivers for TPUs.
DEVICE_FILES = dict(
    cuda=("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg"),
    tpu=("/dev/accel*", "/dev/vfio/[0-9]*"),
)


def chip_of(name: str) -> Chip:
    """The chip of a name such as "v5e", or of a slice such as "v5e:4x4".

    Raises:
      InputError: an unknown chip.
    """
    return CHIPS[check_name("chip", name.partition(":")[0], CHIPS)]


def absent_devices(name: str) -> list[jax.Device]:
    """Devices to compile for: one for "v5e" or "h200", all of a slice for "v5e:4x4".

    Call it before anything else of JAX: what its plugins are told is told before they start.

    Raises:
      InputError: an unknown chip or slice, or its compiler is not installed.
    """
    chip = chip_of(name)
    kind, sliced, _ = name.partition(":")
    if chip.platform == "cuda" and sliced:
        raise InputError(f"{name}: only TPUs come in slices; the chip is {kind}")
    free_compilers()
    check_installed(name, chip.platform)
    if chip.platform == "cuda":
        try:
            return topologies.get_topology_desc(
                name, "cuda", target_config=chip.topology, topology="1x1x1"
            ).devices
        except NotImplementedError:  # the plugin is installed, but JAX could not start it
            raise InputError(
                f"{name}: JAX did not start its CUDA plugin; install the CUDA libraries "
                '(pip install "evit_jax[cuda]"), or do without them with JAX_PLATFORMS=cpu in the '
                "environment"
            ) from None
    # A host has four chips unless told otherwise; libtpu of jax 0.10 then knows no slice of one.
    bounds = {} if sliced else dict(chips_per_host_bounds=(1, 1, 1))
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name if sliced else chip.topology, **bounds
        ).devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise InputError(
            f"{name} is no slice that its compiler knows; {kind} alone is one chip"
        ) from None


def check_installed(name: str, platform: str) -> None:
    """Raises InputError unless the chip's compiler is installed."""
    if platform == "tpu":
        if not (os.environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu")):
            raise InputError(f'{name} needs the compiler of TPUs: pip install "evit_jax[tpu]"')
        return
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else ()
    if not any(any(Path(folder).glob("xla_cuda*")) for folder in folders):
        raise InputError(
            f'{name} needs the compiler of GPUs: pip install "evit_jax[cuda]", or without the CUDA '
            f"libraries pip install jax-cuda13-plugin=={jax.__version__} "
            f"jax-cuda13-pjrt=={jax.__version__}"
        )


def free_compilers() -> None:
    """Has the compilers load where their chips are not, without complaints.

    Where there is a chip, its compiler is left as it is.
    """
    if not present("cuda"):
        # Else JAX takes its CUDA plugin only with the CUDA libraries, which only running needs.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if not present("tpu"):
        # Else libtpu, like a TPU, belongs to one process at a time,
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        # and asks the cloud's metadata server for these, waits, and complains.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def present(platform: str) -> bool:
    """Whether this machine seems to have such a chip."""
    return any(glob.glob(pattern) for pattern in DEVICE_FILES[platform])
