# SPDX-License-Identifier: Apache-2.0
import json

import jax
import numpy as np
import pytest
from PIL import Image

from evit_jax.data.labels import read_label_map
from evit_jax.errors import InputError
from evit_jax.models import create_model
from evit_jax.pictures import labels as drawing
from evit_jax.tools import label
from evit_jax.weights.files import write_safetensors
from evit_jax.weights.names import tensors_from_params
from tests.data.test_sources import make_folder
from tests.tools.test_visualize import TINY, named_tiny

WIDE = dict(TINY, depth=2, num_classes=7)
KINDS = {
    "class head": {},
    "two heads": dict(distilled=True),
    "norm after pooling": dict(pool="avg", class_token=False),
    "patch head": dict(patch_head=True),
}


@pytest.fixture
def prepared(monkeypatch, tmp_path):
    """(kind) -> a model, its parameters and the tool's arguments, on a folder of photographs."""

    def prepare(kind):
        named_tiny(monkeypatch, WIDE | KINDS[kind])
        model, params = create_model("tiny", num_classes=7)
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), params)
        write_safetensors(tmp_path / "tiny.safetensors", tensors_from_params(params, model))
        root = make_folder(tmp_path / "data")
        for path in (root / "train").rglob("*.jpg"):
            pixels = rng.integers(0, 256, (30, 44, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, quality=95)
        flags = dict(model="tiny", weights=tmp_path / "tiny.safetensors", data=root)
        return model, params, flags | dict(out=tmp_path / "maps", batch_size=4, num_classes=7)

    return prepare


def run(flags, capsys):
    """The figures on standard output."""
    label.main([f"--{name}={value}" for name, value in flags.items()])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def expected_logits(kind, model, params, file):
    """(P, C) of the whole image, squeezed, by the model's own answer for a patch."""
    image = np.asarray(Image.open(file).resize((32, 32), Image.Resampling.BICUBIC)) / 255
    _, out = model.apply({"params": params}, np.float32(image[None] - 0.5) / 0.5)
    if kind == "patch head":
        return np.asarray(out["patch_logits"][0])
    x = np.asarray(out["dense"][0])
    if kind == "norm after pooling":
        centered = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
        x = centered * params["fc_norm"]["scale"] + params["fc_norm"]["bias"]
    heads = ("head", "head_dist") if kind == "two heads" else ("head",)
    return np.mean([x @ params[name]["kernel"] + params[name]["bias"] for name in heads], axis=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_map_has_the_largest_logits_of_each_patch_of_the_whole_image(kind, prepared, capsys):
    model, params, flags = prepared(kind)
    figures = run(flags, capsys)
    assert (figures["made"], figures["there"], figures["damaged"]) == (6, 0, 0)
    assert figures["shape"] == [5, 4, 4]
    for name in ("cat/0", "dog/2"):
        found = read_label_map(flags["out"] / f"{name}.npz")
        logits = expected_logits(kind, model, params, flags["data"] / f"train/{name}.jpg")
        order = np.argsort(-logits, axis=1)[:, :5]
        np.testing.assert_array_equal(found.ids.reshape(5, 16).T, order)
        largest = np.take_along_axis(logits, order, axis=1)  # float16 has 11 bits
        np.testing.assert_allclose(found.logits.reshape(5, 16).T, largest, rtol=1e-3, atol=1e-3)


def test_maps_that_are_there_stay_and_damaged_images_get_none(prepared, capsys):
    _, _, flags = prepared("class head")
    (flags["data"] / "train/cat/1.jpg").write_bytes(b"no image")
    assert run(flags, capsys)["damaged"] == 1
    assert not (flags["out"] / "cat/1.npz").exists()
    times = {path: path.stat().st_mtime_ns for path in flags["out"].rglob("*.npz")}
    (flags["out"] / "dog/0.npz").unlink()
    figures = run(flags, capsys)
    assert (figures["made"], figures["there"], figures["damaged"]) == (1, 4, 1)
    same = {path for path, time in times.items() if path.stat().st_mtime_ns == time}
    assert same == times.keys() - {flags["out"] / "dog/0.npz"}


def test_images_that_would_share_a_map_are_refused(prepared, capsys):
    _, _, flags = prepared("class head")
    for number in (0, 1):
        (flags["data"] / f"train/cat/{number}.jpg").rename(
            flags["data"] / f"train/cat/a.{number}.jpg"
        )
    with pytest.raises(SystemExit):
        run(flags, capsys)
    assert "2 images would have the map" in capsys.readouterr().err
    assert not flags["out"].exists()


def test_the_picture_shows_four_panels_of_some_images(prepared, capsys, tmp_path):
    _, _, flags = prepared("class head")
    figures = run(flags | dict(picture=tmp_path / "maps.png", top=2), capsys)
    assert figures["shape"] == [2, 4, 4]
    image = Image.open(figures["picture"])
    assert image.width > 4 * label.PANEL[0]
    assert image.height > 4 * label.PANEL[1]


def test_what_cannot_label_patches_is_one_line(prepared, capsys, tmp_path):
    _, _, flags = prepared("class head")
    with pytest.raises(SystemExit):
        run(flags | dict(top=8), capsys)
    assert "--top must be in [1, 7], got 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(flags | dict(num_classes=1, top=1), capsys)
    assert "2 classes and the annotator 1" in capsys.readouterr().err
    model, _ = create_model("tiny", num_classes=0)
    with pytest.raises(InputError, match="no head that could classify a patch"):
        label.check_annotator(model, 5)


def test_cells_have_the_colors_of_their_classes_and_others_are_gray():
    base = np.full((4, 6, 3), 100, np.uint8)
    classes = np.array([3, 3, 5, 5, 5, 9])
    assert drawing.leading(classes, 2) == [5, 3]
    weights = np.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    panel = drawing.labels_panel(base, classes, weights, [5, 3], (2, 3), (2, 2))
    np.testing.assert_allclose(panel[0, 0], 0.4 * 100 + 0.6 * drawing.COLORS[1], atol=1)
    np.testing.assert_array_equal(panel[0, 2], [100, 100, 100])
    np.testing.assert_allclose(panel[0, 4], 0.4 * 100 + 0.6 * drawing.COLORS[0], atol=1)
    np.testing.assert_allclose(panel[3, 5], 0.4 * 100 + 0.6 * drawing.OTHERS, atol=1)


def test_maps_are_cropped_for_the_picture_as_for_training():
    ids = np.arange(16).reshape(1, 4, 4)
    classes, chances = label.shown(np.full((1, 4, 4), 30.0), ids, 16)
    np.testing.assert_array_equal(classes, np.arange(16))
    assert chances.min() > 0.99
    corner, _ = label.shown(np.full((1, 4, 4), 30.0), ids, 16, (0, 0.5, 0.5, 1), (2, 2))
    np.testing.assert_array_equal(corner, [2, 3, 6, 7])
