# SPDX-License-Identifier: Apache-2.0
"""tools/plan.py as people run it."""

import json

import jax
import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.measure import latency
from evit_jax.models import build_model
from evit_jax.plan.flops import macs
from evit_jax.tools import plan
from tests.measure.test_chip_plan import Chip
from tests.support.trained_run import MODEL, make_run
from tests.tools.test_evaluate import tool

SMALL = "deit_small_patch16_224"
TINY = ["--model=deit_tiny_patch16_224", "--image_size=32"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the tool in this process: the JSON object of its last line, and standard error."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["plan", *arguments])
        plan.main()
        out, err = capsys.readouterr()
        return json.loads(out.strip().rpartition("\n")[2]), err

    return call


def test_a_budget_of_macs_gives_the_argument_to_paste(run):
    figures, err = run(f"--model={SMALL}", "--macs=3.0e9", "--reducer=evit:fuse=False")
    model = build_model(SMALL, macs=3.0e9, reducer="evit:fuse=False")
    assert figures["keep"] == list(model.keep)
    assert figures["tokens"] == list(model.tokens_per_block)
    assert figures["macs"] == macs(model) <= 3.0e9
    assert figures["macs_ratio"] == pytest.approx(macs(build_model(SMALL)) / macs(model))
    pasted = eval(f"dict({figures['argument']})")
    assert build_model(SMALL, **pasted) == model
    counts = f"{model.keep}".replace(" ", "")
    flags = f'--config.model.tokens="{counts}" --config.model.reducer=evit:fuse=False'
    assert figures["config"] == flags
    lines = [line.split() for line in err.splitlines()]
    assert lines[2] == ["dense", "197", "x12", "4.5989"]
    assert lines[3] == ["planned", *["197", "x3,", "139", "x3,", "98", "x3,", "69", "x3", "2.997"]]


def test_a_share_is_one_of_the_dense_models_multiply_accumulates(run):
    budget = 0.65 * macs(build_model(SMALL))
    figures, _ = run(f"--model={SMALL}", "--share=0.65")
    assert figures["keep"] == list(build_model(SMALL, macs=budget).keep)
    assert figures == run(f"--model={SMALL}", f"--macs={budget}")[0]


def test_a_chip_gets_a_plan_of_its_own_with_its_figures(run, monkeypatch):
    chip = Chip(16)
    chip.compiler = "libtpu 1"
    monkeypatch.setattr(plan, "Target", lambda name: chip)
    figures, err = run(f"--model={SMALL}", "--share=0.65", "--chip=v6e", "--batch_size=2")
    assert figures["tokens"][3::3] == [128, 96, 64]
    assert (figures["chip"], figures["batch_size"], figures["improved"]) == ("v6e", 2, True)
    assert figures["compiler"] == "libtpu 1"
    assert [row["plan"] for row in figures["compiled"]] == ["dense", "plain", "tried"]
    dense, plain, found = (row["cycles"] for row in figures["compiled"])
    assert figures["estimate"]["cycles"] == found < plain
    assert figures["estimate"]["speedup"] == dense / found
    assert build_model(SMALL, **eval(f"dict({figures['argument']})")).keep == tuple(figures["keep"])
    lines = err.splitlines()
    assert [line.split()[-1] for line in lines[2:5]] == ["yes", "yes", "planned"]
    assert "Estimated by the compiler, not measured" in lines[5]

    monkeypatch.setattr(plan, "Target", lambda name: Chip(1))
    monkeypatch.setattr(Chip, "compiler", "libtpu 1", raising=False)
    figures, _ = run(f"--model={SMALL}", "--share=0.65", "--chip=v6e")
    assert (figures["improved"], figures["batch_size"]) == (False, 128)
    assert figures["tokens"][3::3] == [138, 97, 69]


def test_layers_and_multiples_are_passed_on(run):
    figures, _ = run(f"--model={SMALL}", "--macs=3.0e9", "--layers=2,5", "--multiple_of=16")
    model = build_model(SMALL, macs=3.0e9, layers=(2, 5), multiple_of=16)
    assert figures["tokens"] == list(model.tokens_per_block)


def test_a_run_without_a_checkpoint_is_planned_with_its_own_layers(run, tmp_path):
    make_run(tmp_path, checkpoint=False, model=dict(reducer="evit:fuse=False"))
    figures, _ = run(f"--workdir={tmp_path}", "--macs=1.8e5")
    sizes = MODEL | dict(patch_size=(4, 4), num_classes=10, reducer="evit:fuse=False")
    model = build_model("vit", macs=1.8e5, **sizes)
    assert figures["tokens"] == list(model.tokens_per_block)
    assert 5 < figures["tokens"][2] < figures["tokens"][1] < figures["tokens"][0] == 17
    assert (figures["model"], figures["reducer"]) == (str(tmp_path), "evit:fuse=False")
    figures, _ = run(f"--workdir={tmp_path}", "--macs=1.8e5", "--layers=0")
    model = build_model("vit", macs=1.8e5, **sizes | dict(layers=(0,)))
    assert figures["tokens"] == list(model.tokens_per_block)


def test_time_is_measured_with_the_weights_of_a_run(run, tmp_path, monkeypatch):
    expected, seen = make_run(tmp_path), []
    stopwatch = latency.stopwatch

    def record(model, params, **settings):
        seen.append(params)
        return stopwatch(model, params, **settings)

    monkeypatch.setattr(latency, "stopwatch", record)
    figures, _ = run(f"--workdir={tmp_path}", "--latency_ms=1e5")
    assert figures["keep"] == [None] * 4
    jax.tree.map(np.testing.assert_array_equal, seen[0], expected)


@pytest.mark.slow
def test_a_budget_of_time_is_measured_here():
    code, figures, err = tool("plan", *TINY, "--latency_ms=1e5", "--batch_size=2")
    assert code == 0, err
    assert figures["keep"] == [None] * 12
    assert figures["macs_ratio"] == figures["speedup"] == 1
    assert 0 < figures["latency_ms"] == figures["dense_latency_ms"] < 1e5
    dense, *others = figures["measured"]
    assert (dense["keep_rate"], dense["tokens"]) == (1, [5] * 12)
    assert 0 < dense["lowest"] <= dense["milliseconds"] == figures["latency_ms"]
    assert [row["tokens"][-1] for row in others] == [5]
    assert "planned" in err


def test_bad_input_is_one_line(run):
    code, _, err = tool("plan", *TINY)
    assert code == 1
    budgets = "--macs=NUMBER, --share=NUMBER, --latency_ms=NUMBER"
    assert err == f"error: give a budget: one of {budgets}\n"
    for arguments, text in {
        ("--macs=1e9", "--latency_ms=1"): "one of --macs",
        ("--macs=1e9", "--share=0.5"): "one of --macs",
        ("--share=60",): "--share must be in (0, 1], got 60",
        ("--chip=v5e", "--latency_ms=1"): "--chip takes --macs or --share",
        ("--chip=v7", "--share=0.5"): "unknown chip 'v7'",
        ("--macs=5",): "the fewest possible are macs=",
        ("--macs=1e9", "--reducer=tome:r=13"): "has a schedule of its own",
        ("--latency_ms=9", "--reducer=tome:r=13"): "has a schedule of its own",
        ("--latency_ms=0",): "above 0 milliseconds",
        ("--latency_ms=9", "--batch_size=0"): "batch_size must be a whole number",
        ("--macs=1e9", "--multiple_of=0"): "multiple_of must be a whole number",
        ("--macs=1e9", "--layers=3;6"): "numbers with commas",
    }.items():
        with pytest.raises(InputError) as error:
            run(*TINY, *arguments)
        assert text in str(error.value)
