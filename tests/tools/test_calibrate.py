# SPDX-License-Identifier: Apache-2.0
import json
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from evit_jax.errors import InputError
from evit_jax.measure import latency
from evit_jax.measure.chip_cost import ChipCost, entering
from evit_jax.models import build_model, init_params
from evit_jax.plan.flops import macs
from evit_jax.tools import calibrate
from evit_jax.weights.files import write_safetensors
from evit_jax.weights.names import tensors_from_params
from tests.measure.test_chip_cost import Blocks

NAME = "vit:image_size=16,patch_size=4,width=16,depth=3,num_heads=2,num_classes=3"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for number in range(12):
        pixels = rng.integers(0, 255, (20, 24, 3), np.uint8)
        name = f"deep/{number}.png" if number % 2 else f"{number}.jpg"
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    (tmp_path / "images" / "notes.txt").write_text("no image")
    sizes = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)
    model = build_model("vit", **sizes)
    params = init_params(model, jax.random.key(0))
    write_safetensors(tmp_path / "w.safetensors", tensors_from_params(params, model))
    return tmp_path


def run(monkeypatch, capsys, *flags):
    monkeypatch.setattr(sys, "argv", ["calibrate", *flags])
    calibrate.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_plan_is_found_written_and_drawn(folder, monkeypatch, capsys):
    flags = [
        f"--model={NAME}",
        f"--weights={folder}/w.safetensors",
        f"--images={folder}/images",
        f"--out={folder}/plan.json",
        f"--plot={folder}/plan.png",
    ]
    found = run(monkeypatch, capsys, *flags, "--share=0.7", "--count=10", "--batch_size=5")
    assert found["images"] == 10
    assert found["macs_ratio"] >= 1 / 0.7
    written = json.loads((folder / "plan.json").read_text())
    assert written["tokens"] == found["tokens"]
    assert found["reducer"] == dict(name="ward", candidates=0.5)
    assert written["reducer"].keys() == {"name", "candidates", "probe"}
    model = build_model(
        "vit",
        image_size=16,
        patch_size=4,
        width=16,
        depth=3,
        num_heads=2,
        num_classes=3,
        plan=f"{folder}/plan.json",
    )
    assert list(model.tokens_per_block) == found["tokens_per_block"]
    assert len(model.reducer.probe) == 3
    assert Image.open(folder / "plan.png").size[0] > 100
    assert (folder / "plan.json.tried").exists()
    best = min(one["value"] for one in found["tried"] if "block" not in one["name"].split()[0])
    assert found["value"] <= best


def test_a_latency_becomes_the_multiply_accumulates_of_the_plan_that_takes_it(
    folder, monkeypatch, capsys
):
    def fit(model, params, *, batch_size, milliseconds, layers):
        assert (batch_size, milliseconds, layers) == (2, 5.0, None)
        return model.clone(keep=model.plan(keep_rate=0.7)), ()

    monkeypatch.setattr(latency, "fit_latency", fit)
    monkeypatch.setattr(latency, "stopwatch", lambda *_, **__: lambda keeps: [np.array([0.004])])
    flags = [f"--model={NAME}", f"--weights={folder}/w.safetensors", f"--images={folder}/images"]
    more = ["--latency_ms=5", "--latency_batch=2", "--reducer=tome", "--sweeps=0"]
    found = run(monkeypatch, capsys, *flags, *more)
    sizes = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)
    timed = build_model("vit", **sizes, reducer="tome", keep_rate=0.7)
    assert found["macs"] <= macs(timed)
    assert found["latency_ms"] == 4


def test_one_budget_is_asked_for(folder, monkeypatch):
    flags = [f"--model={NAME}", f"--weights={folder}/w.safetensors", f"--images={folder}/images"]
    for budgets in ([], ["--latency_ms=1", "--share=0.5"]):
        monkeypatch.setattr(sys, "argv", ["calibrate", *flags, *budgets])
        with pytest.raises(InputError, match="give a budget: one of"):
            calibrate.main()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--images=nowhere", "is no folder"),
        ("--share=2", r"--share must be in \(0, 1\]"),
        ("--out=plan.txt", "--out must be a .json file"),
        ("--count=0", "--count and --batch_size must be 1 or more"),
    ],
)
def test_bad_flags_say_what_to_do(folder, monkeypatch, flag, message):
    flags = [f"--model={NAME}", f"--weights={folder}/w.safetensors", f"--images={folder}/images"]
    monkeypatch.setattr(sys, "argv", ["calibrate", *flags, "--share=0.5", flag])
    with pytest.raises(InputError, match=message):
        calibrate.main()


def test_a_plan_for_a_chip_is_searched_for_again_until_its_whole_program_fits(
    folder, monkeypatch, capsys
):
    class Slow(Blocks):
        """A method that learned something costs much more on it than one that did not."""

        unit, compiler, compiled = "cycles", "none", []

        def logits(self, model, batch_size):
            self.compiled.append(model)
            return super().logits(model, batch_size)

    def surprise(model):
        return 2500 * sum(entering(model)) if model.reducer.probe else 0

    chip = Slow(8, surprise)
    monkeypatch.setattr(calibrate, "Target", lambda name: chip)
    monkeypatch.setattr(calibrate, "price", price_with(chip))
    found = run(
        monkeypatch,
        capsys,
        f"--model={NAME}",
        f"--weights={folder}/w.safetensors",
        f"--images={folder}/images",
        "--share=0.8",
        "--chip=v6e",
        "--sweeps=0",
        "--batch_size=5",
    )
    reduced = [model for model in chip.compiled if model.reducer.probe]
    dense = chip.logits(reduced[0].clone(keep=()), 2).cost
    costs = [chip.logits(model, 2).cost / dense for model in reduced]
    assert costs[0] > 0.8 * (1 + calibrate.SLACK)  # by the first prices
    assert costs[-1] <= 0.8 * (1 + calibrate.SLACK)
    assert found["estimate"]["cycles"] == round(costs[-1] * dense)
    assert found["tokens_per_block"] == list(reduced[-1].tokens_per_block)
    assert all(tokens % 8 == 0 for tokens in found["tokens_per_block"] if tokens < 17)
    assert found["chip"] == "v6e"


def price_with(chip):
    def price(flags, dense, layers, target, share):
        assert (flags.chip, target, share) == ("v6e", chip, 0.8)
        return ChipCost(dense, target, 2)

    return price
