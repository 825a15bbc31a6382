# SPDX-License-Identifier: Apache-2.0
"""The script for the day an accelerator is there, as far as a CPU can show it works."""

import argparse
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models.attention import attention_branch
from evit_jax.plan.flops import macs
from tests.accelerator.attention import fused_branch
from tests.accelerator.jax_side import build
from tests.accelerator.session import OURS, Session, deit, tiny
from tests.accelerator.tables import markdown
from tests.accelerator.timing import kernels_of
from tests.accelerator.workers import Failed, Worker

ROOT = Path(__file__).parents[2]
# What the machines with an accelerator lack, and torch, which the tests cannot count on.
MISSING = ("ml_collections", "grain", "tensorflow_datasets", "tensorflow", "torch", "timm")
BLOCK = f"""
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}")

sys.meta_path.insert(0, Block())
"""


@pytest.fixture
def bare(tmp_path):
    """The environment of a process that lacks MISSING, and so do those it starts."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCK)
    path = f"{folder}{os.pathsep}{ROOT}"
    return os.environ | dict(PYTHONPATH=path, JAX_NUM_CPU_DEVICES="1", PYTHON=sys.executable)


def test_it_needs_no_package_that_the_machine_lacks(bare):
    code = "from tests.accelerator import __main__, jax_side; import there_is_no_such_module"
    done = subprocess.run(
        [sys.executable, "-c", code], env=bare, cwd=ROOT, capture_output=True, text=True
    )
    # That far: the block is at work, and all imports before the last one succeeded.
    assert done.stderr.strip().endswith("No module named 'there_is_no_such_module'")
    blocked = subprocess.run(
        [sys.executable, "-c", "import grain"], env=bare, capture_output=True, text=True
    )
    assert "No module named 'grain'" in blocked.stderr


@pytest.mark.slow
def test_a_rehearsal_fills_every_table(bare, tmp_path):
    out = tmp_path / "out"
    command = [ROOT / "tests/accelerator.sh", "--rehearse"]
    done = subprocess.run(
        command, env=bare | dict(OUT=str(out)), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["errors"] == {}, (out / "jax.log").read_text()
    assert results["skipped"] == []
    assert results["notes"] == [
        "everything of PyTorch was left out: ModuleNotFoundError: No module named 'timm'"
    ]
    assert results["machine"]["platform"] == "cpu"
    assert results["peak"]["flops_per_second"] == max(results["peak"]["by_side"].values())

    got = [(row["mode"], row["batch_size"], row["variant"]) for row in results["speed"]]
    cases = [("inference", 4), ("training", 4), ("inference", 1)]
    assert got == [(*case, name) for case in cases for name in OURS]
    for row in results["speed"]:
        low, high = row["images_per_second_range"]
        assert 0 < low <= row["images_per_second"] <= high
        assert row["ms"] == pytest.approx(1000 * row["batch_size"] / row["images_per_second"])
        work = row["flops"] * (3 if row["mode"] == "training" else 1) * row["images_per_second"]
        share = work / results["peak"]["flops_per_second"]
        assert row["peak_share"] == pytest.approx(share)
        assert ("latency_ms" in row) == (row["batch_size"] == 1)
        assert row["over_dense"] == 1 or row["variant"] != "dense"

    tokens = {row["tokens"] for row in results["attention"]}
    assert tokens == set(tiny().tokens)
    for row in results["attention"]:
        if row["form"].startswith("cuDNN"):
            assert "cuDNN" in row["error"]
        else:
            assert row["ms"] > 0
            assert row["difference"] < 0.02  # bfloat16
    for found, mode in zip(results["profile"], ("inference", "training"), strict=True):
        assert found["mode"] == mode
        assert 0.5 < sum(kernel["share"] for kernel in found["kernels"]) <= 1
        assert (out / f"{mode}.trace.json.gz").stat().st_size > 1000
    assert [row["variant"] for row in results["correctness"]] == list(OURS)
    assert all(row["relative_difference"] < 0.1 for row in results["correctness"])
    assert results["form_tests"]["exit_code"] == 0

    tables = (out / "tables.md").read_text()
    assert tables.strip() == done.stdout.strip()
    assert tables.count("| tiny | ") == len(results["speed"]) + len(results["correctness"])
    assert "A rehearsal with a tiny model" in tables
    again = [*command, f"--resume={out / 'results.json'}"]
    begin = time.monotonic()
    done = subprocess.run(again, env=bare | dict(OUT=str(out)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 60
    assert json.loads((out / "results.json").read_text())["speed"] == results["speed"]


class Fake:
    """A worker whose variants take known times."""

    process = None

    def __init__(self, module, seconds, broken=()):
        self.module, self.seconds, self.broken, self.turns = module, seconds, broken, []

    def send(self, do, **request):
        self.sent = request

    def stop(self):
        pass

    def receive(self, deadline):
        return {
            name: dict(flops=100, macs=60) if name in self.seconds else dict(error="too large")
            for name in self.sent["names"]
        }

    def ask(self, do, deadline, *, name, calls, queued):
        if name in self.broken:
            raise Failed("out of memory")
        self.turns.append(name)
        return self.seconds[name] * (1 if queued else 2)


@pytest.fixture
def session(tmp_path):
    flags = argparse.Namespace(
        out=tmp_path, reference="evit", rehearse=True, resume="", budget=100.0
    )
    session = Session(flags)
    session.results["peak"] = dict(flops_per_second=1e6, bytes_per_second=1e6)
    session.results["machine"] = dict(device="chip", platform="gpu")
    yield session
    session.close()


def test_a_case_compares_variants_of_the_same_rate_over_the_same_rounds(session):
    ours = {"dense": 0.02, "evit 0.7": 0.01, "evit 0.5": 0.005, "tome": 0.0125}
    theirs = {"timm": 0.03, "EViT 1": 0.04, "EViT 0.5": 0.02}
    session.jax = Fake("ours", ours)
    session.torch = Fake("theirs", theirs)
    session.speed(tiny(), "training", 1, False, time.monotonic() + 100)
    rows = {row["variant"]: row for row in session.results["speed"]}
    assert list(rows) == [*ours, *theirs]
    assert rows["dense"]["over"] == pytest.approx({"timm": 1.5, "EViT 1": 2})
    assert rows["evit 0.7"]["over"] == {}  # their 0.7 failed
    assert rows["evit 0.5"]["over"] == pytest.approx({"EViT 0.5": 4})
    assert rows["evit 0.7"]["over_dense"] == pytest.approx(2)
    assert rows["EViT 0.5"]["over_dense"] == pytest.approx(1)
    # 1 image in 0.02 s, forward and twice as much backward, 100 FLOPs each, of 1e6.
    assert rows["dense"]["peak_share"] == pytest.approx(0.015)
    assert rows["dense"]["latency_ms"] == pytest.approx(40)
    assert session.results["notes"] == ["training, tiny, batch 1: EViT 0.7: too large"]
    # Forwards and backwards in turn, twice: queued and awaited.
    order = list(ours)
    assert session.jax.turns == 2 * [*order[::-1], *order, *order[::-1]]
    assert "| 1.50 | 2.00 |" in markdown(session.results)


def test_a_variant_that_fails_in_its_turn_costs_nobody_else_a_row(session):
    session.jax = Fake("ours", dict.fromkeys(OURS, 0.01), broken=["evit 0.5"])
    session.theirs = ()
    session.speed(tiny(), "inference", 4, False, time.monotonic() + 100)
    assert [row["variant"] for row in session.results["speed"]] == ["dense", "evit 0.7", "tome"]
    assert session.results["notes"] == ["inference, tiny, batch 4: evit 0.5: out of memory"]


def test_what_fails_or_no_longer_fits_is_listed_and_the_rest_goes_on(session, monkeypatch):
    session.rehearse = False
    session.flags.budget = 50  # less than a training case is given
    monkeypatch.setattr(session, "open", lambda: None)
    monkeypatch.setattr(session, "peak", lambda deadline: 1 / 0)
    done = []
    for name in ("correctness", "speed", "attention", "profile", "form_tests"):
        monkeypatch.setattr(session, name, lambda *args, name=name: done.append(name))
    session.run()
    results = json.loads((session.out / "results.json").read_text())
    assert results["errors"] == {"peak": "ZeroDivisionError: division by zero"}
    assert set(done) == {"correctness", "speed", "profile"}
    assert list(results["parts"])[:2] == ["correctness", "inference, DeiT-S, batch 256"]
    assert {"training, DeiT-S, batch 256", "attention of DeiT-S"} <= set(results["skipped"])
    everything = {*results["parts"], *results["skipped"], *results["errors"]}
    for model in ("DeiT-S", "DeiT-B"):
        for mode in ("inference", "training"):
            for batch in (1, 64, 256, 1024):
                label = f"{mode}, {model}, batch {batch}"
                assert {label, f"{label}, compiled"} <= everything
    assert "## Skipped for want of time" in (session.out / "tables.md").read_text()


def test_tome_is_given_the_work_of_evit():
    model = "deit_small_patch16_224"
    evit, tome = (macs(build(model, name)) for name in ("evit 0.7", "tome"))
    assert tome == pytest.approx(evit, rel=0.005)
    assert build(model, "evit 0.7").dtype == "bfloat16"


@pytest.mark.parametrize("size", [("small", 384, 6), ("base", 768, 12)])
def test_both_frameworks_are_given_the_same_model(size):
    model = deit(*size)
    ours = build(model.spec, "evit 0.7")
    assert (ours.width, ours.depth, ours.num_heads) == tuple(
        model.sizes[name] for name in ("embed_dim", "depth", "num_heads")
    )
    assert ours.num_classes == model.sizes["num_classes"]
    assert tuple(i for i, keep in enumerate(ours.keep) if keep is not None) == model.layers
    counts = ours.prefix + ours.patches, *(ours.tokens_per_block[i] for i in model.layers)
    assert counts == model.tokens


@pytest.mark.parametrize("tile", [1, 8])
def test_fused_attention_is_the_models_attention(tile):
    rng = np.random.default_rng(0)
    shapes = (2, 13, 24), (24, 72), (24, 24), (72,), (24,)
    x, *rest = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    kernels, biases = (rest[0] / 3, rest[1] / 3), tuple(rest[2:])
    expected, _ = attention_branch(x, kernels, biases, None, num_heads=3, first=None)
    got = fused_branch(x, kernels, biases, num_heads=3, implementation="xla", tile=tile)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


WORKER = """
import os, sys, time
from tests.accelerator.workers import answer

def double(value):
    print("noise")
    return 2 * value

def die():
    print("last words", file=sys.stderr)
    os._exit(3)

def sleep(seconds):
    time.sleep(seconds)

answer(dict(double=double, die=die, sleep=sleep))
"""


def test_a_worker_that_dies_or_hangs_is_started_again(tmp_path):
    (tmp_path / "fake_worker.py").write_text(textwrap.dedent(WORKER))
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    worker = Worker("fake_worker", tmp_path / "log", dict(PYTHONPATH=path))
    soon = time.monotonic() + 60
    try:
        assert worker.ask("double", soon, value=2) == 4
        with pytest.raises(Failed, match=r"(?s)exit code 3.*last words"):
            worker.ask("die", soon)
        assert worker.ask("double", soon, value=3) == 6
        with pytest.raises(Failed, match="TypeError"):
            worker.ask("double", soon, value=None)
        worker.send("sleep")  # a missing argument is an answer, not an end
        with pytest.raises(Failed, match="TypeError"):
            worker.receive(soon)
        process = worker.process
        with pytest.raises(Failed, match="no answer"):
            worker.ask("sleep", time.monotonic() + 0.2, seconds=60)
        assert process.poll() is not None
        assert worker.ask("double", time.monotonic() + 60, value=4) == 8
    finally:
        worker.stop()


def event(name, pid, tid, microseconds, **args):
    return dict(ph="X", name=name, pid=pid, tid=tid, ts=0, dur=microseconds, args=args)


def named(process, *threads):
    yield dict(ph="M", name="process_name", pid=1, args=dict(name=process))
    for tid, name in enumerate(threads):
        yield dict(ph="M", name="thread_name", pid=1, tid=tid, args=dict(name=name))


@pytest.mark.parametrize(
    ("process", "threads"),
    [
        ("/device:GPU:0", ("Stream #13(Compute)", "XLA Ops")),
        ("/device:TPU:0", ("XLA Ops", "Steps")),
    ],
)
def test_a_trace_is_summed_over_the_kernels_of_the_device(process, threads):
    events = [
        *named(process, *threads),
        event("loop_fusion_3", 1, 0, 2000),
        event("loop_fusion_12.1", 1, 0, 1000),
        event("gemm", 1, 0, 500),
        event("jit_step", 1, 1, 9000),  # what holds the kernels
        event("dot.1", 7, 0, 4000, hlo_op="dot.1"),  # on the host
    ]
    spent, count = kernels_of(dict(traceEvents=events))
    assert spent == {"loop_fusion": 3, "gemm": 0.5}
    assert count == {"loop_fusion": 2, "gemm": 1}


def test_a_trace_of_a_cpu_is_summed_over_what_names_an_instruction():
    events = [
        *named("/host:CPU", "main"),
        event("dot.1", 1, 0, 4000, hlo_op="dot.1"),
        event("a Python call", 1, 0, 9000),
    ]
    assert kernels_of(dict(traceEvents=events))[0] == {"dot": 4}
