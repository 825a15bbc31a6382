# SPDX-License-Identifier: Apache-2.0
"""evaluate and convert as people run them, and preprocessing."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import evit_jax
from evit_jax import cli
from evit_jax.data import open_source
from evit_jax.data.augment import decode
from evit_jax.errors import InputError
from evit_jax.models import build_model, init_params
from evit_jax.storage import as_path
from evit_jax.tools import convert, evaluate
from evit_jax.training.checkpoint import Checkpoints
from evit_jax.training.trained import load_run, spec_of_name, spec_of_run
from evit_jax.weights.names import tensors_from_params
from tests.data.test_sources import make_folder
from tests.support.bucket import BUCKET, emulator
from tests.support.trained_run import MODEL, make_run

ROOT = Path(__file__).parents[2]
NAME = "deit_tiny_patch16_224"


def tool(name, *arguments):
    """Exit status, the JSON object of the last line of standard output, standard error."""
    result = subprocess.run(
        [sys.executable, "-m", f"evit_jax.tools.{name}", *map(str, arguments)],
        cwd=ROOT, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    last = result.stdout.strip().rpartition("\n")[2]
    return result.returncode, json.loads(last) if last else None, result.stderr


@pytest.fixture
def refused(monkeypatch, capsys):
    """Calls a tool in this process with bad input: what it says on standard error."""

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.guard(importlib.import_module(f"evit_jax.tools.{name}").main)
        out, err = capsys.readouterr()
        assert (end.value.code, out) == (1, "")
        return err

    return call


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file for DeiT-Tiny at 32 pixels, two blocks' worth of noise larger than its init."""
    model = build_model(NAME, image_size=32)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape).astype(np.float32), shapes)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(tensors_from_params(params, model), path)
    return path


def test_evaluate_counts_every_image_at_every_rate(weights, tmp_path):
    root = make_folder(tmp_path / "data", splits=("val",), classes=("a", "b"), count=5)
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps(["x", "b", "y", "a", *map(str, range(996))]))
    code, figures, err = tool(
        "evaluate", f"--model={NAME}", f"--weights={weights}", f"--data={root}",
        f"--classes={classes}", "--keep_rate=1,0.7", "--batch_size=4", "--image_size=32",
        "--multiple_of=1,5",
    )  # fmt: skip
    assert code == 0, err
    dense, _, reduced, rounded = figures["results"]
    assert (reduced["multiple_of"], rounded["multiple_of"]) == (1, 5)
    assert rounded["loss"] == dense["loss"] != reduced["loss"]  # 5 tokens are all there are
    assert (dense["keep_rate"], reduced["keep_rate"]) == (1, 0.7)
    assert dense["images"] == reduced["images"] == 10
    assert (dense["tokens"][-1], reduced["tokens"]) == (5, [5] * 3 + [5] * 3 + [5] * 6)
    assert dense["images_per_second"] > 0

    # The same by hand, from Python.
    model, params = evit_jax.create_model(NAME, weights=str(weights), image_size=32)
    files = sorted((root / "val").glob("*/*.jpg"))
    images = evit_jax.preprocess(NAME, files, size=(32, 32))
    logits, _ = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
    labels = np.array([3] * 5 + [1] * 5)
    loss = -jax.nn.log_softmax(logits)[np.arange(10), labels].mean()
    assert dense["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert dense["top1"] == np.mean(np.argmax(logits, axis=1) == labels)
    best = np.argsort(-np.asarray(logits), axis=1)[:, :5]
    assert dense["top5"] == np.mean([label in row for label, row in zip(labels, best, strict=True)])


@pytest.fixture
def evaluate_run(monkeypatch, capsys):
    """Calls evaluate in this process: its list of results."""

    def call(workdir, *arguments):
        flags = [f"--workdir={workdir}", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
        evaluate.main()
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (figures["model"], figures["dtype"]) == (str(workdir), "float32")
        return figures["results"]

    return call


def test_a_run_is_evaluated_on_its_own_data_dense_and_at_its_rate(evaluate_run, tmp_path):
    params = make_run(tmp_path / "run", ema=True)
    rows = evaluate_run(tmp_path / "run")
    assert [(row["keep_rate"], row["tokens"]) for row in rows] == [
        (1, [17] * 4), (0.7, [17, 14, 12, 12])
    ]  # fmt: skip
    digits = open_source("digits", "test")
    images = evit_jax.preprocess("vit", [digit["image"] for digit in digits], size=(16, 16))
    labels = np.array(digits.labels)
    for row in rows:
        model = build_model(
            "vit", patch_size=4, num_classes=10, keep_rate=row["keep_rate"], **MODEL
        )
        logits, _ = jax.jit(lambda p, x, model=model: model.apply({"params": p}, x))(params, images)
        loss = -jax.nn.log_softmax(logits)[np.arange(len(labels)), labels].mean()
        assert row["loss"] == pytest.approx(float(loss), rel=1e-4)
        top1 = float(np.mean(np.argmax(logits, axis=1) == labels))
        assert row["top1"] == pytest.approx(top1, abs=0.003)
        assert (row["images"], row["layers"], row["multiple_of"]) == (359, None, 1)
    assert rows[0]["loss"] != rows[1]["loss"]


def test_flags_override_what_a_run_was_trained_with(evaluate_run, tmp_path):
    make_run(tmp_path / "run", model=dict(multiple_of=4))
    root = make_folder(tmp_path / "data", splits=("val",), classes="0123456789", count=1)
    flags = "--layers=0,3", "--reducer=random", "--keep_rate=0.5", "--multiple_of=1,4"
    rows = evaluate_run(tmp_path / "run", f"--data={root}", *flags)
    assert [row["tokens"] for row in rows] == [[9, 9, 9, 5], [12, 12, 12, 8]]
    assert {(tuple(row["layers"]), row["reducer"]) for row in rows} == {((0, 3), "random")}
    assert {row["images"] for row in rows} == {10}


def test_a_run_that_skips_damaged_images_is_evaluated_without_them(evaluate_run, tmp_path, capsys):
    root = make_folder(tmp_path / "data", splits=("val",), classes="0123456789", count=1)
    make_run(tmp_path / "run", model=dict(keep_rate=None))
    (whole,) = evaluate_run(tmp_path / "run", f"--data={root}")
    (root / "val" / "3" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.jpg"):
        evaluate_run(tmp_path / "run", f"--data={root}")

    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["data"] |= dict(name="folder", dir=str(root), damaged="skip")
    path.write_text(json.dumps(config))
    (row,) = evaluate_run(tmp_path / "run")
    assert row["images"] == 10
    assert row["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert row["top1"] == whole["top1"]


def test_a_run_is_evaluated_at_all_that_it_was_trained_at(tmp_path):
    def rates(**changes):
        make_run(tmp_path, checkpoint=False, **changes)
        spec = spec_of_run(str(tmp_path))
        return evaluate.default_rates(spec), evaluate.default_rates(spec.with_reducer("tome:r=2"))

    assert rates() == ((1, 0.7), (1, None))
    assert rates(sandwich=(1.0, 0.8, 0.5)) == ((1, 0.8, 0.7, 0.5), (1, None))
    assert rates(model=dict(keep_rate=None)) == ((1,), (1, None))
    assert rates(model=dict(keep_rate=None, tokens=(9, 5))) == ((1, None), (1, None))
    assert evaluate.default_rates(spec_of_name("vit")) == (None,)


def test_a_run_may_have_more_classes_than_its_data_but_other_data_not(evaluate_run, tmp_path):
    make_run(tmp_path / "run", model=dict(num_classes=12, keep_rate=None))
    (row,) = evaluate_run(tmp_path / "run")
    assert (row["keep_rate"], row["images"]) == (1, 359)
    root = make_folder(tmp_path / "data", splits=("val",), classes="01", count=1)
    with pytest.raises(InputError, match="the data has 2 classes and the model 12"):
        evaluate_run(tmp_path / "run", f"--data={root}")


def test_sizes_are_a_model_too(evaluate_run, tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "run")
    out = tmp_path / "run.safetensors"
    run = load_run(tmp_path / "run")
    save_file(tensors_from_params(run.params, run.model), out)
    root = make_folder(tmp_path / "data", splits=("val",), classes="0123456789", count=1)
    same = f"--data={root}", "--keep_rate=0.7", "--layers=1,2"
    sizes = "vit:image_size=16,patch_size=4,width=16,depth=4,num_heads=2,num_classes=10"
    monkeypatch.setattr(sys, "argv", ["evaluate", f"--model={sizes}", f"--weights={out}", *same])
    evaluate.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = evaluate_run(tmp_path / "run", *same)
    assert found["model"] == sizes
    for name in ("loss", "top1", "top5", "tokens", "layers"):
        assert found["results"][0][name] == row[name]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--keep_rate=70"], "did you mean 0.7?"),
        (["--keep_rate=a"], "expected numbers"),
        (["--reducer=evti"], "did you mean 'evit'?"),
        (["--data=/nowhere"], "/nowhere is not a folder"),
        (["--data="], "--data=FOLDER is needed"),
        (["--weights="], "--weights=FILE is needed"),
        (["--workdir=x"], "leave out --model"),
        (["--classes="], "the data has 2 classes and the model 1000; --classes=FILE"),
        (["--interpolation=cubic"], "did you mean 'bicubic'?"),
        (["--crop=2"], "crop is a fraction in (0, 1]"),
    ],
)
def test_evaluate_answers_bad_input_in_one_line(changes, text, weights, refused, tmp_path):
    root = make_folder(tmp_path, splits=("val",))
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps(["cat", "dog", *map(str, range(998))]))
    err = refused(
        "evaluate", f"--model={NAME}", f"--weights={weights}", f"--data={root}",
        "--image_size=32", "--batch_size=4", f"--classes={classes}", *changes,
    )  # fmt: skip
    assert text in err
    assert err.count("\n") == 1


def test_a_folder_of_class_folders_is_data_too(tmp_path):
    root = make_folder(tmp_path, splits=("photos",), classes=("a", "b"))
    assert len(open_source("folder", "test", str(root / "photos"))) == 6
    source = open_source("folder", "test", str(root / "photos"), classes=("b", "c", "a"))
    assert source.labels == [2, 2, 2, 0, 0, 0]
    with pytest.raises(InputError, match="photos/b is not among the 1 known classes"):
        open_source("folder", "test", str(root / "photos"), classes=("a",))


def test_convert_writes_timm_names_and_the_same_numbers(weights, tmp_path):
    out = tmp_path / "out.safetensors"
    code, figures, err = tool("convert", weights, out)
    assert code == 0, err
    before, after = load_file(weights), load_file(out)
    assert figures == dict(out=str(out), tensors=152, numbers=sum(a.size for a in after.values()))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.slow
def test_convert_takes_the_newest_weights_of_a_training_run(tmp_path):
    line = ["--config=configs/digits.py:debug", f"--workdir={tmp_path / 'run'}",
            "--config.epochs=0.1", "--config.ema_decay=0.9"]  # fmt: skip
    subprocess.run([sys.executable, "train.py", *line], cwd=ROOT, check=True, capture_output=True)
    code, figures, err = tool("convert", tmp_path / "run", tmp_path / "out.safetensors")
    assert code == 0, err
    assert figures["numbers"] == 53_994
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["model"].pop("name")
    model, params = evit_jax.create_model(
        "vit", weights=str(tmp_path / "out.safetensors"), **config["model"]
    )
    digits = open_source("digits", "test")
    images = evit_jax.preprocess("vit", [digits[i]["image"] for i in range(359)], size=(24, 24))
    logits, _ = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, images)
    # What was evaluated are the averaged weights, and so are what is written.
    averaged = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).load()["ema"]
    jax.tree.map(np.testing.assert_array_equal, params, averaged)
    final = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    top1 = np.mean(np.argmax(logits, axis=1) == np.array(digits.labels))
    assert top1 == pytest.approx(final["test_top1"], abs=1e-6)


def test_convert_takes_a_run_from_a_bucket(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.safetensors"
    with emulator() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        workdir = f"gs://{BUCKET}/runs/tools"
        monkeypatch.setattr(sys, "argv", ["convert", workdir, str(out)])
        params = make_run(as_path(workdir))
        convert.main()
        model = load_run(workdir).model
    assert json.loads(capsys.readouterr().out)["tensors"] == len(load_file(out)) == 56
    for name, array in tensors_from_params(params, model).items():
        np.testing.assert_array_equal(load_file(out)[name], array)


@pytest.mark.parametrize(
    ("source", "out", "text"),
    [
        ("nothing.pth", "out.safetensors", "nothing.pth"),
        (".", "out.safetensors", "no training run"),
        ("nothing.pth", "out.bin", "should end in .safetensors"),
    ],
)
def test_convert_answers_bad_input_in_one_line(source, out, text, refused, tmp_path):
    err = refused("convert", tmp_path / source, tmp_path / out)
    assert text in err
    assert err.count("\n") == 1


def test_preprocessing_is_the_evaluation_view(tmp_path):
    path = tmp_path / "x.png"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    one, two = evit_jax.preprocess(NAME, [path, pixels])
    np.testing.assert_array_equal(one, two)
    assert one.shape == (224, 224, 3)
    assert one.dtype == jnp.float32
    resized = decode(pixels, "x").resize((341, 256), Image.Resampling.BICUBIC)
    cropped = np.asarray(resized.crop((58, 16, 282, 240)), np.float32) / 255
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    np.testing.assert_allclose(one, (cropped - mean) / std, rtol=1e-5, atol=1e-5)


def test_preprocessing_takes_one_image_and_the_models_own_size():
    pixels = np.zeros((40, 50, 3), np.uint8)
    assert evit_jax.preprocess("deit_base_patch16_384", pixels).shape == (1, 384, 384, 3)
    assert evit_jax.preprocess("vit", [pixels, pixels], size=48).shape == (2, 48, 48, 3)
    with pytest.raises(InputError, match="must be a path or a uint8 array"):
        evit_jax.preprocess(NAME, pixels / 255)


def test_preprocessing_names_what_it_cannot_read(tmp_path):
    with pytest.raises(InputError, match=r"none\.jpg is not a file"):
        evit_jax.preprocess(NAME, [tmp_path / "none.jpg"])
    with pytest.raises(InputError, match="no images"):
        evit_jax.preprocess(NAME, [])
