# SPDX-License-Identifier: Apache-2.0
"""One session for all tests: four virtual CPU devices, strict ranks, programs compiled once.

A plain run leaves out the tests marked `slow`, --slow runs all. XLA is told to compile quickly;
with --optimized programs are those that users get. `.ci/run` does so for parity with PyTorch alone,
and on an older Python takes one parameter set of each test (--one-each).
"""

import os
import subprocess
import sys
import tempfile

import jax
import pytest

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

# Compiling is most of the time of the tests, whose programs run for milliseconds: a small model
# takes 2.3 s instead of 10.4 on jax 0.12. The second flag is known to jax 0.10, not to 0.12.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
# Ends at once, by XLA's own hand, where a version does not know one of the flags.
PROBE = "from jaxlib import _jax; _jax.CompileOptions().executable_build_options.debug_options"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run all tests, also those marked slow")
    parser.addoption(
        "--optimized", action="store_true", help="optimize programs as for users, which takes long"
    )
    parser.addoption(
        "--one-each", action="store_true", help="of tests with many parameter sets, run one set"
    )


def pytest_configure(config):
    # Before anything is compiled. Workers and the processes that tests start inherit it.
    if config.getoption("optimized") or hasattr(config, "workerinput"):
        return
    for flag in QUICK:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        probe = [sys.executable, "-c", PROBE]
        environment = os.environ | dict(XLA_FLAGS=flags)
        if subprocess.run(probe, env=environment, stderr=subprocess.DEVNULL).returncode == 0:
            os.environ["XLA_FLAGS"] = flags


LEFT_OUT = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    """Leaves slow tests out, but for those that the command line names one by one."""
    kept = items[:]
    if not (config.getoption("slow") or any("::" in argument for argument in config.args)):
        kept = [item for item in items if not item.get_closest_marker("slow")]
    config.stash[LEFT_OUT] = len(items) - len(kept)
    if config.getoption("one_each"):
        kept = one_each(kept)
    config.hook.pytest_deselected(items=list({*items} - {*kept}))
    items[:] = kept


def one_each(items):
    """One parameter set of each test, not always the first, so that all methods meet some tests."""
    sets = {}
    for item in items:
        sets.setdefault(item.nodeid.partition("[")[0], []).append(item)
    return [group[place % len(group)] for place, group in enumerate(sets.values())]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a worker's way to tell the first process
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    config, left_out = node.config, getattr(node, "workeroutput", {}).get("left_out", 0)
    config.stash[LEFT_OUT] = max(left_out, config.stash.get(LEFT_OUT, 0))


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{count} slow tests were left out; python -m pytest --slow runs them too"
        )
    if not config.getoption("optimized") and QUICK[0] not in os.environ.get("XLA_FLAGS", ""):
        terminalreporter.write_line(
            f"this jaxlib does not know {QUICK[0]}, so all programs were optimized, which takes "
            "several times as long; see tests/conftest.py"
        )
