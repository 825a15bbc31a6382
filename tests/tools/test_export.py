# SPDX-License-Identifier: Apache-2.0
"""The export tool as people run it."""

import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from evit_jax.errors import InputError
from evit_jax.export import stablehlo
from evit_jax.models import build_model, preprocessing
from evit_jax.tools import export
from evit_jax.weights.files import write_safetensors
from evit_jax.weights.names import tensors_from_params
from tests.data.test_sources import make_folder
from tests.support.trained_run import make_run

NAME = "vit:image_size=16,patch_size=4,width=16,depth=3,num_heads=2,num_classes=3"
SIZES = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)


@pytest.fixture
def weights(tmp_path):
    model = build_model("vit", **SIZES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32), shapes)
    path = tmp_path / "w.safetensors"
    write_safetensors(path, tensors_from_params(params["params"], model))
    return path, params


def run(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, flags)])
    export.main()
    out, err = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), err


def test_a_reduced_model_is_written_checked_and_described(weights, tmp_path, monkeypatch, capsys):
    pytest.importorskip("flatbuffers")
    path, params = weights
    flags = [f"--model={NAME}", f"--weights={path}", "--keep_rate=0.5", "--layers=1"]
    found, err = run(monkeypatch, capsys, *flags, f"--out={tmp_path}/out", "--quantize=int8")
    plain, small = found["files"]
    assert (plain["quantize"], small["quantize"]) == (None, "int8")
    assert plain["differences"].keys() == {"1", "5"}
    assert max(plain["differences"].values()) < 1e-5
    assert 0 < max(small["differences"].values()) < 1
    assert small["bytes"] < plain["bytes"]
    assert "model.stablehlo, batch 5: off by" in err

    about = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert about["tokens_per_block"] == found["tokens"] == [17, 10, 10]
    assert about["keep"] == [None, 8, None]
    assert about["reducer"] == "evit"
    card = preprocessing("vit")
    assert about["input"]["mean"] == list(card.mean)
    assert about["input"]["size"] == [16, 16]

    model = build_model("vit", **SIZES, keep_rate=0.5, layers=(1,))
    images = np.random.default_rng(3).normal(size=(2, 16, 16, 3)).astype(np.float32)
    logits = stablehlo.load(plain["path"])(images)
    np.testing.assert_allclose(logits, model.apply(params, images)[0], atol=1e-5)


def test_top1_of_each_file_is_that_of_the_images(weights, tmp_path, monkeypatch, capsys):
    pytest.importorskip("flatbuffers")
    path, _ = weights
    root = make_folder(tmp_path / "data", splits=("val",), classes=("a", "b", "c"), count=3)
    flags = [f"--model={NAME}", f"--weights={path}", f"--out={tmp_path}/out", f"--data={root}"]
    found, _ = run(monkeypatch, capsys, *flags, "--quantize=int8", "--batch=4")
    assert found["images"] == 9
    assert found["files"][0]["differences"].keys() == {"4"}
    assert found["files"][0]["top1"] == found["flax"]["top1"]
    assert found["files"][0]["agreement"] == found["flax"]["agreement"] == 1
    assert found["files"][0]["kl"] == pytest.approx(0, abs=1e-9)
    assert 0 < found["files"][1]["kl"] < 0.1
    about = json.loads((tmp_path / "out" / "preprocessing.json").read_text())
    assert about["output"]["classes"] == ["a", "b", "c"]


def test_a_run_and_images_without_labels_are_enough(tmp_path, monkeypatch, capsys):
    pytest.importorskip("flatbuffers")
    make_run(tmp_path / "run")
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 255, (20, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    flags = [f"--workdir={tmp_path}/run", f"--images={tmp_path}/images", f"--out={tmp_path}/out"]
    found, _ = run(monkeypatch, capsys, *flags, "--rounds=1", "--time_batch=2")
    (plain,) = found["files"]
    assert (found["images"], plain["agreement"]) == (3, 1)
    assert "top1" not in plain
    assert plain["images_per_second"] > 0
    assert found["flax"]["images_per_second_range"][0] > 0


def test_a_file_that_is_off_is_an_error(weights, tmp_path, monkeypatch, capsys):
    pytest.importorskip("flatbuffers")
    path, _ = weights
    load = stablehlo.load
    monkeypatch.setattr(stablehlo, "load", lambda path: lambda x: load(path)(x) + 2e-4)
    flags = [f"--model={NAME}", f"--weights={path}", f"--out={tmp_path}/out"]
    with pytest.raises(InputError, match=r"is off by 0\.0002"):
        run(monkeypatch, capsys, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--formats=onx"], "unknown format 'onx'; did you mean 'onnx'"),
        (["--batch=0"], "--batch must be any, or a number from 1 up"),
        (["--keep_rate=0.5", "--share=0.5"], "--keep_rate and --share each say how much"),
        (["--images=x", "--data=y"], "--images has no labels and --data has"),
        (["--platforms="], "need one name or more"),
        (["--share=2"], r"--share must be in \(0, 1\]"),
    ],
)
def test_bad_flags_say_what_to_do(weights, tmp_path, monkeypatch, capsys, flags, message):
    path, _ = weights
    with pytest.raises(InputError, match=message):
        run(
            monkeypatch, capsys, f"--model={NAME}", f"--weights={path}", f"--out={tmp_path}", *flags
        )
