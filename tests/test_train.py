# SPDX-License-Identifier: Apache-2.0
"""train.py as people run it: every :debug config, killing and resuming, and what goes wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from evit_jax.training import optim
from evit_jax.training.checkpoint import Checkpoints
from tests.data.test_sources import jpeg, make_folder

ROOT = Path(__file__).parents[1]
DIGITS = "--config=configs/digits.py:debug"
LIMITED = ["sh", "-c", 'ulimit -f 150; exec "$@"', "sh"]  # files of 75 to 150 KB at most
OFTEN = ["--config.epochs=1.0", "--config.run.checkpoint_every=0.2", "--config.run.log_every=7"]


def start(*arguments, prefix=(), **more):
    environment = os.environ | dict(JAX_NUM_CPU_DEVICES="2") | more
    return subprocess.Popen(
        [*prefix, sys.executable, "train.py", *map(str, arguments)],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_for(process, text=""):
    """The first line that a process prints with this text in it."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(process.stderr.read()[-2000:])


def rest_of(process):
    """(exit status, output, errors) of a process of which some lines may have been read."""
    out, err = process.stdout.read(), process.stderr.read()
    return process.wait(), out, err


def train(*arguments, prefix=(), **more):
    process = start(*arguments, prefix=prefix, **more)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def figures(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


def same_results(a, b):
    """Everything recorded that is not a time."""

    def untimed(lines):
        times = re.compile("images_per_second|data_wait|speedup|time_to_first_step")
        return [{k: v for k, v in line.items() if not times.search(k)} for line in lines]

    assert untimed(figures(a)) == untimed(figures(b))


@pytest.mark.parametrize(
    "name",
    [
        "digits",
        pytest.param("cifar10", marks=pytest.mark.slow),
        pytest.param("evit_deit_s", marks=pytest.mark.slow),
        pytest.param("evit_deit_finetune", marks=pytest.mark.slow),
        pytest.param("evit_lvvit", marks=pytest.mark.slow),
        pytest.param("deit3", marks=pytest.mark.slow),
        pytest.param("learned", marks=pytest.mark.slow),
    ],
)
def test_every_debug_config_trains_and_ends_with_the_table(name, tmp_path):
    code, out, err = train(
        f"--config=configs/{name}.py:debug", f"--workdir={tmp_path}", JAX_LOG_COMPILES="1"
    )
    assert code == 0, err
    assert "reduced over dense" in out
    *_, final = lines = figures(tmp_path)
    assert final["final"]
    assert 0 < final["macs"] < final["dense_macs"]
    assert final["images_per_second"] > 0
    assert {"step", "epoch", "train_loss", "lr", "keep_rate", "images_per_second",
            "data_wait"} <= lines[0].keys()  # fmt: skip
    assert f"first step done {lines[0]['time_to_first_step']:.1f} s after the start:" in out
    evaluations = [line for line in lines if "test_top1" in line]
    assert {"step", "test_top1", "test_top5", "test_loss"} <= evaluations[0].keys()
    assert (tmp_path / "checkpoints" / str(final["step"])).is_dir()
    assert any((tmp_path / "tensorboard").iterdir())
    # As many programs as stages of the keep rate.
    assert err.count("Finished XLA compilation of jit(train_step)") == out.count("compiled in")
    assert out.count("compiled in") == (3 if name == "evit_deit_s" else 1)


@pytest.mark.slow
def test_a_log_line_is_the_mean_since_the_last_one_at_the_rate_of_its_step(tmp_path):
    lines = {}
    for every in (1, 3):
        workdir = tmp_path / str(every)
        code, _, err = train(
            DIGITS, f"--workdir={workdir}", f"--config.run.log_every={every}",
            "--config.epochs=0.2", "--config.optimizer.warmup_epochs=0.1",
        )  # fmt: skip
        assert code == 0, err
        lines[every] = [line for line in figures(workdir) if "train_loss" in line]
    single, means = lines[1], lines[3]
    assert [line["step"] for line in single] == list(range(1, 10))
    assert [line["step"] for line in means] == [3, 6, 9]
    for i, line in enumerate(means):
        window = [one["train_loss"] for one in single[3 * i : 3 * i + 3]]
        assert line["train_loss"] == pytest.approx(np.mean(window), rel=1e-5)
    schedule = optim.learning_rate(
        lr=2e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=4, total_steps=9
    )
    expected = [float(schedule(step)) for step in range(9)]
    assert [line["lr"] for line in single] == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    code, _, err = train(DIGITS, f"--workdir={workdir}", *OFTEN)
    assert code == 0, err
    return workdir


def kill_when(condition, process):
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_run_killed_twice_ends_bit_identical_to_one_never_killed(whole, tmp_path):
    line = [DIGITS, f"--workdir={tmp_path}", *OFTEN]
    checkpoints = tmp_path / "checkpoints"
    # While a checkpoint is being written, and just after some later one.
    kill_when(lambda: any(checkpoints.glob("*tmp*")), start(*line))
    before, process = {*checkpoints.iterdir()}, start(*line)
    kill_when(lambda: any(p.name.isdigit() for p in {*checkpoints.iterdir()} - before), process)
    code, out, err = train(*line)
    assert code == 0, err
    assert "resuming from the checkpoint of step" in out
    same_results(tmp_path, whole)
    step = figures(whole)[-1]["step"]
    assert Checkpoints(checkpoints).latest == Checkpoints(whole / "checkpoints").latest == step
    ours, theirs = (
        ocp.PyTreeCheckpointer().restore(path / "checkpoints" / str(step) / "state")
        for path in (tmp_path, whole)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_run_asked_to_end_saves_exits_and_has_lost_nothing(whole, tmp_path):
    line = [DIGITS, f"--workdir={tmp_path}", *OFTEN]
    process = start(*line)
    wait_for(process, "loss")
    process.send_signal(signal.SIGTERM)
    code, out, err = rest_of(process)
    assert code == 0, err
    stopped = re.search(r"stopped after step (\d+), and saved; rerun the same command", out)
    assert stopped, out
    code, out, err = train(*line)
    assert code == 0, err
    assert f"resuming from the checkpoint of step {stopped[1]} in" in out
    same_results(tmp_path, whole)


def test_figures_that_are_not_finite_end_the_run_with_step_checkpoint_and_images(tmp_path):
    code, _, err = train(
        DIGITS, f"--workdir={tmp_path}", "--config.optimizer.lr=1e30",
        "--config.optimizer.warmup_lr=0.0", "--config.optimizer.warmup_epochs=1.0",
        "--config.run.checkpoint_every=0.02",
    )  # fmt: skip
    assert code == 1
    assert "Traceback" not in err
    step, good = re.search(
        r"step (\d+) is not finite .*checkpoint is that of step (\d+);", err
    ).groups()
    assert int(good) < int(step)
    assert (tmp_path / "checkpoints" / good).is_dir()
    saved = Checkpoints(tmp_path / "checkpoints", read_only=True).load()["params"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))
    record = json.loads((tmp_path / "broken_batch.json").read_text())
    assert record["step"] == int(step)
    assert len(set(record["indices"])) == 32
    assert f"images are number {record['indices'][0]}, " in err


@pytest.mark.slow
def test_one_checkpoint_is_trained_for_many_rates(tmp_path):
    code, out, err = train(
        DIGITS, f"--workdir={tmp_path}", "--config.sandwich=(1.0, 0.8, 0.6, 0.4)",
        "--config.distill.teacher=self", "--config.run.parallel=pmap", "--config.mix.cutmix=1.0",
        "--config.run.accumulate=2", "--config.augment.repeats=3",
        "--config.augment.randaugment_magnitude=9.0", "--config.model.remat=True",
        "--config.epochs=0.4", "--config.model.depth=2", "--config.model.layers=(0, 1)",
    )  # fmt: skip
    assert code == 0, err
    assert out.count("compiled in") == 2  # one with 0.8, one with 0.6 between
    final = figures(tmp_path)[-1]
    assert list(final["test_top1_of"]) == ["0.4", "0.6", "0.8", "dense"]
    assert (final["keep_rate"], final["test_top1"]) == (0.4, final["test_top1_of"]["0.4"])
    for rate in ("0.4 over dense", "0.6 over dense", "0.8 over dense"):
        assert rate in out


@pytest.mark.slow
def test_a_run_starts_from_weights_and_distils_stored_logits(whole, tmp_path):
    weights, logits = tmp_path / "weights.safetensors", tmp_path / "logits.npy"
    subprocess.run(
        [sys.executable, "-m", "evit_jax.tools.convert", whole, weights], cwd=ROOT, check=True,
        capture_output=True,
    )  # fmt: skip
    np.save(logits, np.zeros((1438, 10), np.float16))
    line = [DIGITS, f"--workdir={tmp_path / 'run'}", f"--config.weights={weights}",
            "--config.epochs=0.05"]  # fmt: skip
    code, _, err = train(*line, "--config.optimizer.lr=0.0", "--config.optimizer.warmup_lr=0.0",
                         "--config.optimizer.min_lr=0.0")  # fmt: skip
    assert code == 0, err
    assert figures(tmp_path / "run")[-1]["test_top1"] == figures(whole)[-1]["test_top1"]
    line[1] = f"--workdir={tmp_path / 'taught'}"
    code, _, err = train(*line, f"--config.distill.teacher={logits}", "--config.distill.hard=False",
                         "--config.distill.alpha=1.0")  # fmt: skip
    assert code == 0, err


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("distill.teacher=deit_tiny_patch16_224", "--config.distill.weights=FILE"),
        ("distill.weights=deit.safetensors", "for a teacher that is named"),
        ("distill.teacher=none.npy", "there is no file none.npy"),
        ("new_head=True", "new_head is for --config.weights=FILE"),
        ("sandwich=(0.5,)", "at least two different keep rates"),
        ("run.test_batch_size=7", "run.test_batch_size must be a positive multiple of the 2"),
        ("epochs=inf", "epochs must be above 0, got inf"),
    ],
)
def test_what_does_not_fit_together_is_one_line(field, message, tmp_path):
    code, _, err = train(DIGITS, f"--workdir={tmp_path}", f"--config.{field}")
    assert code == 1
    assert err.count("\n") == 1
    assert message in err


def test_a_finished_run_only_shows_its_result_again(whole):
    before = figures(whole)
    code, out, err = train(DIGITS, f"--workdir={whole}", *OFTEN)
    assert code == 0, err
    assert "reduced over dense" in out
    assert "compiled" not in out
    assert len(figures(whole)) == len(before)
    assert figures(whole)[-1]["test_top1"] == before[-1]["test_top1"]


def test_a_workdir_of_another_config_is_refused(whole):
    before = sorted(whole.rglob("*"))
    code, _, err = train(DIGITS, f"--workdir={whole}", "--config.model.keep_rate=0.5")
    assert code == 1
    assert err.count("\n") == 1
    assert "model.keep_rate is 0.7 there and 0.5 here" in err
    assert sorted(whole.rglob("*")) == before


def test_a_broken_photo_stops_the_run_naming_it(tmp_path):
    root = make_folder(tmp_path / "data", count=8)
    (root / "train" / "dog" / "5.jpg").write_bytes(jpeg((1, 2, 3), size=(64, 64))[:500])
    code, _, err = train(
        "--config=configs/cifar10.py:debug", f"--workdir={tmp_path / 'run'}",
        "--config.data.name=folder", f"--config.data.dir={root}", "--config.batch_size=8",
    )  # fmt: skip
    assert code == 1
    assert "train/dog/5.jpg cannot be read as an image" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only_is_one_clear_line(tmp_path):
    # The kernel refuses to write further, as on a full disk.
    code, _, err = train(DIGITS, f"--workdir={tmp_path / 'full'}", prefix=LIMITED)
    assert code == 1
    assert "error: could not save to" in err
    assert "rerun the same command to resume" in err
    assert "Traceback" not in err
    (tmp_path / "file").write_text("")
    code, _, err = train(DIGITS, f"--workdir={tmp_path / 'file' / 'run'}")
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_chips_that_are_not_there_are_for_dry_runs():
    code, _, err = train(DIGITS, "--chips=v5e:2x2")
    assert code == 1
    assert err == ("error: --chips is for dry runs; add --config.dry_run=True, or leave it out\n")


def test_a_dry_run_prints_the_plan_and_touches_nothing(tmp_path):
    code, out, err = train(
        DIGITS, f"--workdir={tmp_path / 'run'}", "--config.dry_run=True",
        "--config.data.name=folder",
    )  # fmt: skip
    assert code == 0, err
    for text in ("patch_embed", "tokens after each block", "GMACs", "training step"):
        assert text in out
    assert not (tmp_path / "run").exists()
