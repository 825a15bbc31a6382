# SPDX-License-Identifier: Apache-2.0
"""Processes that compile the same programs, and the folder in which these are kept."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import pytest

from evit_jax.runtime import compilation_cache
from evit_jax.runtime.compilation_cache import private_folder, tidy, turn_on

ROOT = Path(__file__).parents[2]
# Prints how often JAX found a program or kept a new one, and the results of two, compiled ahead
# and at the first call.
PROGRAM = """
import collections, jax, jax.numpy as jnp
from evit_jax import cli
from evit_jax.runtime.parallel import DataParallel

def step(state, batch, frozen):
    noise = jax.random.normal(jax.random.key(3), (8, 64))
    return jax.tree.map(lambda w: jnp.tanh(batch @ w) + noise, state), {}

def main():
    counts = collections.Counter()
    jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
    devices = DataParallel(jax.devices()[:1])
    weights = jnp.linspace(-1, 1, 8 * 64).reshape(8, 64)
    batch = jnp.linspace(0, 1, 8 * 8).reshape(8, 8)
    train = devices.compile_train(step, dict(w=weights), batch, {})
    evaluate = devices.compile_eval(lambda params, batch: jax.nn.softmax(batch @ params))
    results = evaluate(weights, batch), train(dict(w=weights), batch, {})[0]["w"]
    bits = b"".join(jax.device_get(result).tobytes() for result in results)
    print(counts["cache_hits"], counts["cache_misses"], bits.hex())

cli.guard(main)
"""


def start(cache, **more):
    environment = os.environ | dict(XDG_CACHE_HOME=str(cache)) | more
    del environment["JAX_COMPILATION_CACHE_DIR"]
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def result(process):
    """(programs found, programs kept, the bits of the results)"""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    hits, misses, bits = out.split()
    return int(hits), int(misses), bits


def test_what_one_process_compiled_others_find_with_the_same_results(tmp_path):
    both = [result(process) for process in [start(tmp_path), start(tmp_path)]]  # at once
    folder = tmp_path / "evit_jax" / "programs"
    kept = sorted(folder.glob("*-cache"))
    assert {path.name.split("-")[0] for path in kept} >= {"jit_step", "jit__lambda"}
    assert [part.stat().st_mode & 0o777 for part in (folder.parent, folder)] == [0o700, 0o700]
    assert all(hits + misses == len(kept) for hits, misses, _ in both)

    # What was left of a killed process is not used, and mends itself.
    whole = kept[0].read_bytes()
    kept[0].chmod(0o600)
    kept[0].write_bytes(whole[: len(whole) // 2])
    hits, misses, bits = result(start(tmp_path))
    assert (hits, misses) == (len(kept) - 1, 1)
    assert kept[0].stat().st_size > len(whole) // 2
    again = result(start(tmp_path))
    assert again[:2] == (len(kept), 0)
    off = result(start(tmp_path / "other", JAX_ENABLE_COMPILATION_CACHE="false"))
    assert off[:2] == (0, 0)
    assert not (tmp_path / "other").exists()
    assert {bits, again[2], off[2], both[0][2], both[1][2]} == {bits}


@pytest.fixture
def config():
    """JAX's settings as a user has them, given back afterwards."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_folder_of_the_users_own_stays(config, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    turn_on()
    assert config.jax_compilation_cache_dir == str(tmp_path / "own")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["a file in its place", "another's", "open to all", "no home"])
def test_without_a_folder_of_ones_own_it_goes_on_with_one_line(
    what, config, monkeypatch, tmp_path, capsys
):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if what == "a file in its place":
        cache.write_text("")
    else:
        folder = private_folder()
    if what == "another's":
        monkeypatch.setattr(compilation_cache.os, "getuid", lambda: folder.stat().st_uid + 1)
    if what == "open to all":
        cache.chmod(0o777)
    if what == "no home":
        for variable in ("XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(variable)
        monkeypatch.setattr("pwd.getpwuid", lambda user: (_ for _ in ()).throw(KeyError))
    turn_on()
    assert config.jax_compilation_cache_dir is None
    err = capsys.readouterr().err
    assert err.startswith("compiled programs are not kept: ")
    assert err.count("\n") == 1
    assert str(cache) in err or what in ("another's", "no home")


def test_a_link_to_an_open_folder_is_seen_through(monkeypatch, tmp_path):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (tmp_path / "cache").symlink_to(shared)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(PermissionError, match=f"others may change {shared}"):
        private_folder()


def test_tidying_removes_what_is_not_whole_and_what_was_not_used_for_longest(tmp_path):
    def program(name, content, used):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(content)
        os.utime(path, (used, used))
        return path

    content = zlib.compress(os.urandom(1000))
    program("broken", content[:-1], 5)
    program("empty", b"", 6)
    times = dict(a=3, b=2, c=4)
    a, b, c = (program(name, content, used) for name, used in times.items())
    other = program("other", bytes.fromhex("28b52ffd") + bytes(9), 7)  # not packed by zlib
    tidy(tmp_path, limit=10_000)
    assert sorted(tmp_path.iterdir()) == [a, b, c, other]
    assert c.stat().st_mode & 0o777 == 0o400
    assert c.read_bytes() == content

    for name, used in times.items():  # looking at them was a use
        os.utime(tmp_path / f"{name}-cache", (used, used))
    tidy(tmp_path, limit=2 * len(content) + 100)
    assert sorted(tmp_path.iterdir()) == [a, c, other]
