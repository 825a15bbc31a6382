# SPDX-License-Identifier: Apache-2.0
"""One session for all tests: four virtual CPU devices, strict ranks, programs compiled once."""

import os
import tempfile

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same programs, in this process and in the ones they start. The first
# process of pytest makes the folder and removes it; its workers inherit the name.
if "EVIT_JAX_TEST_PROGRAMS" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="evit_jax_test_programs_")
    os.environ["EVIT_JAX_TEST_PROGRAMS"] = cache.name
settings = dict(
    jax_compilation_cache_dir=os.environ["EVIT_JAX_TEST_PROGRAMS"],
    jax_persistent_cache_min_compile_time_secs=0,
    jax_persistent_cache_min_entry_size_bytes=-1,
)
for name, value in settings.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
# What another process is still writing, or a full disk cut off, is compiled, without a word.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache"
