# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evit_jax.data import open_source
from evit_jax.models import create_model, named
from evit_jax.models.images import preprocess
from evit_jax.pictures import patches
from evit_jax.pictures.patches import DROPPED, FUSED, KEPT, patch_states
from evit_jax.reducers.evit import EViT
from evit_jax.tokens import Signals, Tokens
from evit_jax.tools import visualize
from evit_jax.training.trained import load_run
from evit_jax.weights.files import write_safetensors
from evit_jax.weights.names import tensors_from_params
from tests.support.trained_run import make_run

TINY = dict(image_size=32, patch_size=8, width=32, depth=4, num_heads=4, num_classes=10)
GRID, CELL = (2, 3), (4, 5)


def named_tiny(monkeypatch, sizes):
    """Puts a model of these sizes among the named ones as "tiny"."""
    card = dict(statistics="half", crop=0.9, image_size=sizes["image_size"], num_classes=10)
    entry = dict(backbone="vit", settings=sizes, tags={"": card})
    monkeypatch.setitem(named.table(), "tiny", entry)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Names a tiny model, and gives its weights and two photographs as arguments."""
    named_tiny(monkeypatch, TINY)
    model, params = create_model("tiny")
    write_safetensors(tmp_path / "tiny.safetensors", tensors_from_params(params, model))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 50, 70, 3), dtype=np.uint8)
    for name, array in zip("ab", pixels, strict=True):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    return {
        "--model": "tiny",
        "--weights": tmp_path / "tiny.safetensors",
        "--keep_rate": 0.5,
        "--out": tmp_path / "out.png",
    }


def run(flags, folder, capsys, images=("a.png", "b.png")):
    """The figures on standard output."""
    flags = [f"{name}={value}" for name, value in flags.items() if value is not None]
    visualize.main([*flags, *(str(folder / image) for image in images)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def reduce(reducer, tokens, attention, keep):
    """One step of EViT with this class attention of the patch tokens."""
    k = jnp.log(jnp.asarray([1e-6, *attention], jnp.float32))[None, None, :, None]
    return reducer(tokens, Signals(q=jnp.ones_like(k), k=k), keep)


def six_patches():
    owner = jnp.arange(6, dtype=jnp.int32)[None]
    return Tokens(x=jnp.ones((1, 7, 4)), size=jnp.ones((1, 7)), owner=owner)


def test_dropped_patches_are_dropped_and_stay_so():
    tokens = reduce(EViT(fuse=False), six_patches(), [6, 1, 5, 2, 4, 3], 4)
    first = patch_states(np.asarray(tokens.owner[0]))
    assert first.tolist() == [KEPT, DROPPED, KEPT, DROPPED, KEPT, KEPT]
    tokens = reduce(EViT(fuse=False), tokens, [1, 2, 3, 4], 2)  # in the order 0, 2, 4, 5
    second = patch_states(np.asarray(tokens.owner[0]))
    assert second.tolist() == [DROPPED, DROPPED, DROPPED, DROPPED, KEPT, KEPT]


@pytest.mark.parametrize("fused_attention", [0, 9])
def test_fused_patches_stay_fused_whether_their_token_is_selected_again_or_not(fused_attention):
    tokens = reduce(EViT(), six_patches(), [6, 1, 5, 2, 4, 3], 4)
    first = patch_states(np.asarray(tokens.owner[0]))
    assert first.tolist() == [KEPT, FUSED, KEPT, FUSED, KEPT, KEPT]

    tokens = reduce(EViT(), tokens, [1, 2, 3, 4, fused_attention], 3)
    owner = np.asarray(tokens.owner[0])
    again = fused_attention > 0  # then 0 and 2 fuse anew and the token of 1 and 3 is the first
    alone = [4, 5] if again else [2, 4, 5]
    assert np.flatnonzero(patch_states(owner) == KEPT).tolist() == alone
    assert (patch_states(owner) != DROPPED).all()
    assert owner[1] == owner[3] == (0 if again else 3)
    assert (owner[0] == owner[1]) != again


def test_every_token_of_several_patches_is_fused_as_merging_makes_many():
    owner = np.array([0, 2, 2, 1, -1, 0, 3])
    expected = [FUSED, FUSED, FUSED, KEPT, DROPPED, FUSED, KEPT]
    assert patch_states(owner).tolist() == expected


def panel_and_cells(owner):
    """A grey-free base, the panel drawn over it, and the pixels of both by patch."""
    base = np.random.default_rng(0).integers(0, 256, (8, 15, 3), dtype=np.uint8)
    panel = patches.patches_panel(base, np.array(owner), GRID, CELL)

    def by_patch(array):
        return array.reshape(2, 4, 3, 5, 3).swapaxes(1, 2).reshape(6, 4, 5, 3)

    return by_patch(base), by_patch(panel)


def test_kept_patches_are_untouched_dropped_ones_dark_and_fused_ones_tinted():
    base, panel = panel_and_cells([0, -1, 1, 2, 2, -1])
    np.testing.assert_array_equal(panel[[0, 2]], base[[0, 2]])
    assert panel[[1, 5]].max() <= 0.2 * 255 + 1
    assert (np.ptp(panel[[1, 5]].astype(int), axis=-1) == 0).all()  # grey
    assert (panel[[3, 4], ..., 1] > panel[[3, 4], ..., 0] + 30).all()  # towards TINT


def test_a_line_is_around_every_token_and_none_within():
    _, panel = panel_and_cells([0, 1, 0, 2, 2, 1])
    line = (panel == patches.TINT).all(-1)
    assert line[3, :, 0].all()
    assert not line[3, 1:-1, -1].any()  # 3 and 4 are one token
    assert not line[4, 1:-1, 0].any()
    assert line[4, :, -1].all()
    assert line[5, :, 0].all()  # 4 and 5 are two
    assert not line[:, 1:-1, 1:-1].any()


def test_attention_is_brighter_where_there_is_more_of_it():
    base = np.full((8, 15, 3), 128, np.uint8)
    attention = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    panel = patches.attention_panel(base, attention, GRID, CELL)
    assert (np.diff(panel[::4, ::5].sum(-1, dtype=int).reshape(-1)) > 0).all()
    assert (patches.attention_panel(base, 0 * attention, GRID, CELL) < 5).all()


@pytest.mark.parametrize(
    ("size", "grid", "cell"),
    [
        ((224, 224), (14, 14), (12, 12)),
        ((224, 320), (14, 20), (10, 10)),
        ((32, 64), (4, 4), (30, 59)),
    ],
)
def test_panels_have_whole_cells_and_the_aspect_of_the_image(size, grid, cell):
    assert patches.cell_size(size, grid) == cell
    assert patches.base_panel(Image.new("RGB", size[::-1]), grid, cell).shape == (
        grid[0] * cell[0],
        grid[1] * cell[1],
        3,
    )


def test_the_figures_and_the_picture_agree_with_the_model(tiny, tmp_path, capsys):
    found = run(tiny, tmp_path, capsys)
    assert found["out"] == str(tmp_path / "out.png")
    model, params = create_model("tiny", weights=str(tiny["--weights"]), keep_rate=0.5)
    assert found["blocks"] == [i for i, keep in enumerate(model.keep) if keep] == [1, 2, 3]
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    images = preprocess("tiny", paths, size=model.image_size)
    logits, out = jax.jit(model.apply)({"params": params}, images)
    for i, row in enumerate(found["images"]):
        assert row["image"] == str(paths[i])
        assert row["reduced"]["class"] == int(logits[i].argmax())
        best = float(jax.nn.softmax(logits[i]).max())
        assert row["reduced"]["probability"] == pytest.approx(best, abs=1e-6)
        for block, owner in enumerate(out["owner"]):
            states = patch_states(np.asarray(owner[i])).tolist()
            counts = [states.count(state) for state in (KEPT, FUSED, DROPPED)]
            assert counts == [row[name][block] for name in ("kept", "fused", "dropped")]
        assert row["kept"][0] == 8
        assert row["dropped"] == [0, 0, 0]
    with Image.open(found["out"]) as picture:
        assert picture.format == "PNG"
        assert picture.size == (5 * (168 + 8) + 8, 8 + 44 + 2 * (18 + 168 + 24 + 8))


def test_one_image_of_another_size_and_aspect_with_class_names(tiny, tmp_path, capsys):
    names = tmp_path / "names.json"
    names.write_text(
        json.dumps([f"class {i}, with\na name beyond all limits " * 5 for i in range(10)])
    )
    flags = tiny | {"--image_size": "32,64", "--classes": names, "--reducer": "evit:fuse=False"}
    found = run(flags, tmp_path, capsys, images=["a.png"])
    assert found["patches"] == 32
    assert found["images"][0]["kept"] == [16, 8, 4]
    assert found["images"][0]["dropped"] == [16, 24, 28]
    assert found["images"][0]["dense"]["class"].startswith("class ")
    with Image.open(found["out"]) as picture:
        assert picture.size[1] == 8 + 44 + 18 + 4 * 30 + 24 + 8


def test_a_method_that_reduces_in_every_block_gets_six_panels_and_all_figures(
    tiny, tmp_path, capsys, monkeypatch
):
    drawn, page = [], patches.page

    def record(rows, *rest):
        drawn.extend(rows)
        return page(rows, *rest)

    monkeypatch.setattr(patches, "page", record)
    named_tiny(monkeypatch, TINY | dict(depth=7))
    model, params = create_model("tiny")
    write_safetensors(tiny["--weights"], tensors_from_params(params, model))
    found = run(tiny | {"--reducer": "tome:r=1", "--keep_rate": None}, tmp_path, capsys)
    row = found["images"][0]
    assert found["blocks"] == list(range(7))
    assert row["kept"][0] == 14
    assert row["dropped"] == [0] * 7
    assert [kept + fused for kept, fused in zip(row["kept"], row["fused"], strict=True)] == [16] * 7
    assert row["kept"] == sorted(row["kept"], reverse=True)
    labels = drawn[0].labels[2:]
    assert [int(label.split(":")[0].split()[1]) for label in labels] == [0, 1, 2, 4, 5, 6]
    assert labels[-1] == f"block 6: {row['kept'][-1]} of 16"


@pytest.mark.parametrize("layers", ["0", "1"])
def test_a_method_at_its_blocks_input_shows_attention_to_every_patch(
    layers, tiny, tmp_path, capsys
):
    found = run(tiny | {"--reducer": "dpcknn", "--layers": layers}, tmp_path, capsys)
    assert found["images"][0]["kept"][0] + found["images"][0]["fused"][0] == 16
    assert Image.open(tiny["--out"]).size[0] > 100


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"--model": "tinny"}, "did you mean 'tiny'?"),
        ({"--keep_rate": 70}, "did you mean 0.7?"),
        ({"--keep_rate": "half"}, "invalid float value: 'half'"),
        ({"--keep_rate": 1}, "no block reduces"),
        ({"--keep_rate": None}, "--keep_rate=0.7"),
        ({"--weights": None}, "--weights=FILE is needed"),
        ({"--weights": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"--reducer": "evitt"}, "did you mean 'evit'?"),
        ({"--image_size": "big"}, "224,320"),
        ({"--image_size": "33"}, "not a multiple"),
        ({"--classes": "nowhere.json"}, "nowhere.json is not a file"),
        ({"--classes": __file__}, "test_visualize.py is not JSON"),
        ({"--model": None}, "give --model=NAME, or --workdir=DIR"),
        ({"--workdir": "x"}, "leave out --model"),
        ({"--out": "nowhere/out.png"}, "cannot be written"),
        ({"--out": "out.jpg"}, "must be a .png file"),
        ({"--out": None}, "--out"),
        ({"--rate": 0.7}, "--rate=0.7"),
    ],
)
def test_bad_arguments_are_one_line_and_nothing_is_written(changes, text, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(tiny | changes, tmp_path, capsys)
    assert exit_.value.code == 1
    check_line(capsys.readouterr(), text)
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("image", "text"),
    [("c.png", "c.png is not a file"), ("tiny.safetensors", "cannot be read as an image")],
)
def test_a_missing_or_broken_image_is_one_line(image, text, tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tiny, tmp_path, capsys, images=["a.png", image])
    check_line(capsys.readouterr(), text)


def test_no_image_is_overwritten(tiny, tmp_path, capsys):
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(SystemExit):
        run(tiny | {"--out": tmp_path / "a.png"}, tmp_path, capsys)
    check_line(capsys.readouterr(), "would be lost")
    assert (tmp_path / "a.png").read_bytes() == before


@pytest.fixture
def trained(tmp_path):
    """The flags for a run on digits, whose model is of another size than the tiny one."""
    make_run(tmp_path / "run")
    return {"--workdir": tmp_path / "run", "--out": tmp_path / "out.png"}


def test_a_run_shows_test_images_of_different_classes_at_its_own_rate(trained, tmp_path, capsys):
    found = run(trained, tmp_path, capsys, images=())
    assert found["blocks"] == [1, 2]
    digits = {digit["name"]: digit for digit in open_source("digits", "test")}
    assert len({row["label"] for row in found["images"]}) == len(found["images"]) == 4
    own = load_run(tmp_path / "run")
    for row in found["images"]:
        digit = digits[row["image"]]
        assert row["label"] == str(digit["label"])
        images = preprocess("vit", [digit["image"]], size=(16, 16))
        logits, out = jax.jit(own.model.apply)({"params": own.params}, images)
        assert row["reduced"]["class"] == str(int(logits.argmax()))
        best = float(jax.nn.softmax(logits).max())
        assert row["reduced"]["probability"] == pytest.approx(best, abs=1e-5)
        states = [patch_states(np.asarray(owner[0])).tolist() for owner in out["owner"]]
        assert row["kept"] == [state.count(KEPT) for state in states]


def test_a_run_takes_other_images_flags_and_names_too(trained, tiny, tmp_path, capsys):
    flags = trained | {"--layers": "0,3", "--reducer": "evit:fuse=False", "--keep_rate": 0.5}
    found = run(flags, tmp_path, capsys, images=["a.png"])
    assert found["blocks"] == [0, 3]
    assert found["images"][0]["kept"] == [8, 4]
    assert found["images"][0]["dense"]["class"] in set("0123456789")  # of the run's data
    assert "label" not in found["images"][0]

    names = tmp_path / "names.json"
    names.write_text(json.dumps(["crane"] * 10))
    found = run(trained | {"--classes": names}, tmp_path, capsys, images=())
    assert {row["label"] for row in found["images"]} == {"crane"}

    names.write_text(json.dumps(["crane"] * 9))
    with pytest.raises(SystemExit):
        run(trained | {"--classes": names}, tmp_path, capsys, images=["a.png"])
    check_line(capsys.readouterr(), "has 9 names and the model 10 classes")


def test_classes_have_numbers_where_the_data_of_a_run_is_not_at_hand(tmp_path, tiny, capsys):
    make_run(tmp_path / "run", data=dict(name="folder", dir="/nowhere"))
    flags = {"--workdir": tmp_path / "run", "--out": tmp_path / "out.png"}
    found = run(flags, tmp_path, capsys, images=["a.png"])
    assert type(found["images"][0]["dense"]["class"]) is int
    with pytest.raises(SystemExit):
        run(flags, tmp_path, capsys, images=())
    check_line(capsys.readouterr(), "/nowhere is not a folder")


def test_without_an_image_or_a_run_there_is_nothing_to_look_at(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tiny, tmp_path, capsys, images=())
    check_line(capsys.readouterr(), "name an image to look at, or --workdir=DIR")


def test_examples_are_of_different_classes_as_far_as_there_are_some():
    by_class = [dict(label=label) for label in range(5) for _ in range(300)]
    assert [row["label"] for row in visualize.varied_examples(by_class, 4)] == [0, 1, 2, 3]
    two = [dict(label=int(i == 7), name=i) for i in range(9)]
    found = visualize.varied_examples(two, 4)
    assert sorted(row["label"] for row in found) == [0, 0, 0, 1]
    assert len({row["name"] for row in found}) == 4
    assert visualize.varied_examples(two[:1], 4) == two[:1]


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        visualize.write_png(path, Image.new("RGB", (4, 4)))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_program_says_in_one_line_what_it_needs():
    command = [sys.executable, "-m", "evit_jax.tools.visualize", "x.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: the following arguments are required: --out")
    assert done.stderr.count("\n") == 1


def check_line(captured, text):
    """One line on standard error that says so, nothing on standard output."""
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert text in captured.err
