# SPDX-License-Identifier: Apache-2.0
"""One session for all tests: four virtual CPU devices, and no silent broadcasting of ranks."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _strict_ranks():
    jax.config.update("jax_numpy_rank_promotion", "raise")
