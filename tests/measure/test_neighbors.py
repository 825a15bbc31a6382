# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbors by hand, and the evaluation that uses them."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evit_jax.data import open_source, pipeline
from evit_jax.errors import InputError
from evit_jax.measure.neighbors import NearestNeighbors, encode
from evit_jax.models import build_model, init_params
from evit_jax.models.card import Preprocessing
from evit_jax.runtime.parallel import DataParallel
from evit_jax.tools import evaluate
from evit_jax.weights.files import write_safetensors
from evit_jax.weights.names import tensors_from_params
from tests.support.trained_run import make_run

SIZES = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2)
MODEL = build_model("vit", **SIZES, num_classes=0)
COLORS = dict(blue=(40, 60, 220), green=(30, 200, 60), red=(220, 40, 40))


def folder(root, count, seed):
    """Pictures of noisy colors, a class each."""
    rng = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(rng.normal(color, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_votes_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    bank, labels = rng.normal(size=(9, 5)), np.asarray([0, 1, 2, 0, 1, 2, 0, 1, 1])
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    features = rng.normal(size=(4, 5))

    class Features:
        def apply(self, variables, images):
            return images * variables["params"], {}

    classifier = NearestNeighbors(Features(), classes=4, neighbors=3, temperature=0.2)
    params = dict(model=jnp.float32(2), bank=jnp.asarray(bank), labels=jnp.asarray(labels))
    got, _ = classifier.apply({"params": params}, jnp.asarray(features, jnp.float32))
    for row, feature in zip(np.asarray(got), features, strict=True):
        similar = [float(feature @ other / np.linalg.norm(feature)) for other in bank]
        votes = [0.0] * 4
        for index in sorted(range(9), key=lambda i: -similar[i])[:3]:
            votes[labels[index]] += math.exp((similar[index] - 1) / 0.2)
        np.testing.assert_allclose(np.exp(row), votes, rtol=1e-4, atol=2e-12)


def test_padding_and_damaged_images_are_not_in_the_bank(tmp_path):
    root = folder(tmp_path / "images", 3, seed=0)
    (root / "green" / "1.png").write_bytes(b"not an image")
    params = init_params(MODEL, jax.random.key(0))
    source = open_source("folder", "test", str(root))
    batches = pipeline.eval_batches(
        source, size=(16, 16), crop=1.0, interpolation="bicubic", batch_size=4, damaged="skip"
    )
    card, seen = Preprocessing(), []
    (bank,), labels = encode([MODEL], params, batches, DataParallel(), card, see=seen.append)
    assert labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert len(seen) == 3
    np.testing.assert_allclose(np.linalg.norm(bank, axis=1), np.ones(8), rtol=1e-5)
    pixels = np.asarray(Image.open(root / "red" / "2.png"))[None]
    features = np.asarray(MODEL.apply({"params": params}, card.normalize(pixels))[0][0])
    np.testing.assert_allclose(bank[-1], features / np.linalg.norm(features), atol=1e-5)


def test_evaluate_classifies_by_the_neighbors_of_a_labeled_folder(tmp_path, monkeypatch, capsys):
    folder(tmp_path / "labeled", 4, seed=1)
    folder(tmp_path / "test", 3, seed=2)
    (tmp_path / "test" / "green").rename(
        tmp_path / "gone"
    )  # the labeled ones say what the names are
    write_safetensors(
        tmp_path / "w.safetensors",
        tensors_from_params(init_params(MODEL, jax.random.key(0)), MODEL),
    )
    sizes = ",".join(f"{name}={value}" for name, value in SIZES.items())
    flags = [
        f"--model=vit:{sizes},num_classes=0",
        f"--weights={tmp_path}/w.safetensors",
        f"--data={tmp_path}/test",
        f"--knn={tmp_path}/labeled",
        "--neighbors=3",
        "--keep_rate=1,0.7",
        "--layers=1",
        "--batch_size=4",
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    evaluate.main()
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [row["images"] for row in results] == [6, 6]
    assert [row["top1"] for row in results] == [1.0, 1.0]
    assert [row["tokens"][-1] for row in results] == [17, 14]
    assert all(0 <= row["loss"] < math.log(3) for row in results)


def test_labeled_images_of_other_classes_are_refused(tmp_path, monkeypatch):
    make_run(tmp_path / "run", checkpoint=False)  # on digits
    folder(tmp_path / "labeled", 1, seed=1)
    flags = [f"--workdir={tmp_path}/run", f"--knn={tmp_path}/labeled"]
    monkeypatch.setattr(sys, "argv", ["evaluate", *flags])
    with pytest.raises(InputError, match="has 3 classes and the test images 10, and not the same"):
        evaluate.main()
