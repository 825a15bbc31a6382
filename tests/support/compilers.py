# SPDX-License-Identifier: Apache-2.0
"""Marks for tests that need the compiler of a chip, which an extra of the package installs."""

import importlib.util
from pathlib import Path

import pytest


def cuda_plugin() -> bool:
    plugins = importlib.util.find_spec("jax_plugins")
    folders = plugins.submodule_search_locations if plugins else ()
    return any(any(Path(folder).glob("xla_cuda*")) for folder in folders)


needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs pip install "evit_jax[tpu]"'
)
needs_cuda_compiler = pytest.mark.skipif(
    not cuda_plugin(), reason='needs pip install "evit_jax[cuda]"'
)
