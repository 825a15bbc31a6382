# SPDX-License-Identifier: Apache-2.0
"""compare as people run it, on a run's small model and a folder of noise."""

import functools
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import evit_jax
from evit_jax import cli
from evit_jax.data import pipeline
from evit_jax.errors import InputError
from evit_jax.measure.candidates import dense_twin
from evit_jax.models import build_model, init_params, load_params
from evit_jax.plan.flops import macs
from evit_jax.runtime.parallel import DataParallel
from evit_jax.tools import compare
from evit_jax.training.trained import load_run, spec_of_run
from evit_jax.weights.names import tensors_from_params
from tests.support.reducers import Predictor
from tests.support.trained_run import make_run

CLASSES = "0123456789"
PER_CLASS = 3
SIZES = dict(image_size=16, patch_size=4, width=16, depth=4, num_heads=2, num_classes=10)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Class folders of noise, each image with a color of its own."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(1)
    for name in CLASSES:
        (root / "val" / name).mkdir(parents=True)
        for index in range(PER_CLASS):
            pixels = rng.integers(0, 120, (20, 24, 3)) + rng.integers(0, 130, 3)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "val" / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file for a small model with weights so large that its answers differ."""

    def draw(path, shape):
        values = rng.normal(0, 0.7, shape.shape)
        calm = {"scale": 1 + 0.3 * values, "bias": 0.1 * values}
        return calm.get(path[-1].key, values).astype(np.float32)

    model = build_model("vit", **SIZES)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(1)
    params = jax.tree_util.tree_map_with_path(draw, shapes)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_file(tensors_from_params(params, model), path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls compare in this process: the JSON object and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        compare.main()
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), err

    return call


@functools.cache
def logits_of(weights, files, **settings):
    """(images, 10) float64 of a variant of the model, straight from Python; and the variant."""
    model = build_model("vit", **SIZES, **settings)
    params = load_params(str(weights), model, key=jax.random.key(0))
    images = evit_jax.preprocess("vit", files, size=(16, 16))
    logits, _ = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
    return np.asarray(logits, np.float64), model


def log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def test_figures_are_those_of_the_logits(call, weights, data, tmp_path, monkeypatch):
    decoded, decode = [], pipeline.decode
    monkeypatch.setattr(pipeline, "decode", lambda *a: decoded.append(a[1]) or decode(*a))
    plan = tmp_path / "fitted.json"
    plan.write_text(json.dumps(dict(reducer="tome", tokens=[12, 9, None, 7])))
    sizes = ",".join(f"{name}={value}" for name, value in SIZES.items())
    found, err = call(
        f"--model=vit:{sizes}", f"--weights={weights}", f"--data={data}",
        "--methods=evit:fuse=False;ward;window", "--shares=0.6,0.8", f"--plan_files={plan}",
        "--batch_size=8", "--rounds=2", f"--out={tmp_path / 'picture.png'}",
    )  # fmt: skip
    files = tuple(sorted((data / "val").glob("*/*.png")))
    assert sorted(decoded) == [str(path) for path in files]  # once, for all variants

    whole, dense_model = logits_of(weights, files, keep_rate=1)
    labels = np.array([int(path.parent.name) for path in files])
    dense, *rows = found["results"]
    assert (dense["method"], dense["plan"], dense["budget"]) == ("dense", None, None)
    assert dense["macs"] == macs(dense_model)
    assert dense["top1"] == pytest.approx(np.mean(whole.argmax(axis=1) == labels))
    assert (dense["kl"], dense["agreement"], dense["won"], dense["lost"]) == (0, 1, 0, 0)
    assert found["images"] == len(files) == 30
    assert found["labels"]
    assert {"model", "dtype", "device", "jax", "flax", "batch_size", "rounds"} <= found.keys()
    budgets = [share * dense["macs"] for share in (0.6, 0.8)]
    assert [(row["method"], row["plan"], row["budget"]) for row in rows] == [
        (method, plan_name, budget)
        for method in ("evit:fuse=False", "ward")
        for budget in budgets
        for plan_name in ("own", "constant")
    ] + [("tome", str(plan), budgets[1])]

    for row in rows:
        logits, model = logits_of(weights, files, reducer=row["method"], tokens=tuple(row["keep"]))
        assert (row["tokens"], row["macs"]) == (list(model.tokens_per_block), macs(model))
        assert row["macs"] <= row["budget"]
        first, best = logits.argmax(axis=1), np.argsort(-logits, axis=1)[:, :5]
        change = (first == labels).astype(int) - (whole.argmax(axis=1) == labels)
        p, q = log_softmax(whole), log_softmax(logits)
        kl = np.sum(np.exp(p) * (p - q), axis=1)
        assert row["kl"] == pytest.approx(kl.mean(), rel=1e-3, abs=1e-6)
        assert row["kl_error"] == pytest.approx(kl.std(ddof=1) / np.sqrt(30), rel=1e-3, abs=1e-6)
        assert row["agreement"] == np.mean(first == whole.argmax(axis=1))
        assert (row["won"], row["lost"]) == (np.sum(change == 1), np.sum(change == -1))
        assert row["top1"] == pytest.approx(dense["top1"] + change.mean())
        assert row["top1_error"] == pytest.approx(change.std(ddof=1) / np.sqrt(30))
        assert row["top5"] == pytest.approx(
            np.mean([y in b for y, b in zip(labels, best, strict=True)])
        )
        assert row["images_per_second"] > 0
        low, high = row["speedup_range"]
        assert low <= row["speedup"] <= high
        beaten = [
            one for one in rows if one["macs"] <= 1.01 * row["macs"] and one["kl"] < row["kl"]
        ]  # fmt: skip
        assert row["on_frontier"] == (not beaten)
    assert sum(row["kl"] > 0.001 for row in rows) > 4
    assert max(row["won"] + row["lost"] for row in rows) > 0
    assert min(row["agreement"] for row in rows) < 1

    # A window halves the grid, whatever the budget.
    assert {(one["method"], one["plan"]) for one in found["refused"]} == {
        ("window", "own"), ("window", "constant")
    }  # fmt: skip
    assert "not compared: window (own within" in err
    assert err.count("has a schedule of its own") == 1
    assert "own = constant" in err
    with Image.open(tmp_path / "picture.png") as drawn:
        assert drawn.size[1] > drawn.size[0]


def test_images_without_labels_are_enough(call, run, data, tmp_path):
    for number, path in enumerate(sorted((data / "val").glob("[01]/*.png"))):
        (tmp_path / f"{number}.png").write_bytes(path.read_bytes())
    flags = f"--workdir={run}", "--methods=evit", "--shares=0.7", "--plans=own", "--rounds=0"
    plain, err = call(*flags, f"--data={tmp_path}", f"--out={tmp_path / 'picture.png'}")
    assert "without labels, so without top-1" in err
    assert "top-1, " not in err
    assert not plain["labels"]
    for row in plain["results"]:
        assert row["top1"] is row["won"] is row["top1_error"] is row["images_per_second"] is None
    reduced = plain["results"][1]
    assert reduced["kl"] > 0
    assert plain["images"] == 6

    told, _ = call(*flags, f"--data={data}", "--labels=no")
    assert told["results"][1]["top1"] is None
    assert told["images"] == 30
    two = tmp_path / "two"
    for name in "01":
        (two / name).mkdir(parents=True)
        for path in (data / "val" / name).iterdir():
            (two / name / path.name).write_bytes(path.read_bytes())
    other, err = call(*flags, f"--data={two}")
    assert "the data has 2 classes and the model 10; --classes=FILE" in err
    assert other["results"][1] == reduced


def test_a_method_whose_parameters_nobody_trained_is_refused(run):
    spec = spec_of_run(str(run))
    dense, shared = dense_twin(spec), load_run(run).params
    assert compare.load_params(spec, dense, shared, DataParallel()) is shared
    model = dense.clone(reducer=Predictor(), keep=(None, 8, None, None))
    with pytest.raises(InputError, match="parameters of its own and the weights have none"):
        compare.load_params(spec, model, shared, DataParallel())


def test_layers_hold_for_every_method(call, run, data):
    found, _ = call(
        f"--workdir={run}", f"--data={data}", "--methods=evit,tome", "--shares=0.9",
        "--plans=own", "--rounds=0", "--layers=2",
    )  # fmt: skip
    assert [row["method"] for row in found["results"]] == ["dense", "evit", "tome"]
    for row in found["results"][1:]:
        assert row["tokens"][1] == 17 > row["tokens"][2] == row["tokens"][3]


def test_where_no_method_meets_a_budget_the_dense_model_and_the_reasons_remain(
    run, data, tmp_path, monkeypatch, capsys
):
    flags = f"--workdir={run}", f"--data={data}", "--methods=evit", "--macs=1", "--rounds=0"
    monkeypatch.setattr(sys, "argv", ["compare", *flags, f"--out={tmp_path / 'picture.png'}"])
    with pytest.raises(InputError, match="no picture, as no method meets a budget"):
        compare.main()
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert [row["method"] for row in found["results"]] == ["dense"]
    assert all("the fewest possible" in one["reason"] for one in found["refused"])
    assert "not compared: evit (own within" in err


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--methods=evti"], "did you mean 'evit'?"),
        (["--shares=1.5"], "--shares must be in (0, 1] each"),
        (["--macs=-1"], "--macs must be more than 0 each"),
        (["--plans=onw"], "did you mean 'own'?"),
        (["--plan_files=none.json"], "none.json is not a file"),
        (["--labels=yes"], "unknown value of --labels 'yes'"),
        (["--rounds=-1"], "must be 0 or more"),
        (["--out=x.pdf"], "--out must be a .png file"),
        (["--data=/nowhere"], "/nowhere is not a folder"),
        (["--weights=x"], "leave out --weights"),
    ],
)
def test_bad_input_is_answered_in_one_line(changes, text, run, data, monkeypatch, capsys):
    flags = [f"--workdir={run}", f"--data={data}", "--batch_size=4", *changes]
    monkeypatch.setattr(sys, "argv", ["compare", *flags])
    with pytest.raises(SystemExit) as end:
        cli.guard(compare.main)
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (1, "")
    assert text in err
    assert err.count("\n") == 1
