# SPDX-License-Identifier: Apache-2.0
"""What a training run left, as a model, and the model that a tool's flags ask for."""

import argparse
import json

import jax
import numpy as np
import pytest

from evit_jax import cli
from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.training.trained import load_run, open_spec
from evit_jax.weights.names import params_from_tensors, tensors_from_params
from tests.support.trained_run import MODEL, make_run

ALL = tuple(cli.MODEL_FLAGS)
NO_WEIGHTS = tuple(name for name in ALL if name != "weights")


def spec(*arguments, names=NO_WEIGHTS):
    """What the flags of a tool ask for."""
    parser = argparse.ArgumentParser()
    cli.add_model_flags(parser, *names)
    return open_spec(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_is_its_model_and_its_newest_weights_averaged_if_they_are(ema, tmp_path):
    expected = make_run(tmp_path / "run", ema=ema)
    run = load_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, run.params, expected)
    assert run.model.keep == (None, 12, 10, None)  # of 16 and of 13, at 0.7 in blocks 1 and 2
    assert run.config["data"]["name"] == "digits"


def test_a_run_that_recovered_tokens_gives_its_weights_to_the_method_without(tmp_path):
    model = dict(reducer="sit:recovery=True", keep_rate=0.7, depth=2, layers=(0,))
    expected = make_run(tmp_path, model=model)
    assert "recovery" in expected["blocks_1"]
    own = spec(f"--workdir={tmp_path}")
    jax.tree.map(np.testing.assert_array_equal, own.load_params(own.build()), expected)
    settings = json.loads((tmp_path / "config.json").read_text())["model"]
    plain = build_model(**settings | dict(reducer="sit"))
    without = {
        name: {k: v for k, v in tree.items() if k != "recovery"} if "blocks" in name else tree
        for name, tree in expected.items()
    }
    jax.tree.map(np.testing.assert_array_equal, own.load_params(plain), without)


def test_a_folder_that_is_no_run_or_has_no_checkpoint_says_so(tmp_path):
    for folder, text in (
        (tmp_path, "is no training run: it has no config.json"),
        (tmp_path / "nothing", "nothing is no training run: there is no such folder"),
    ):
        with pytest.raises(InputError, match=text):
            load_run(folder)
    make_run(tmp_path / "new", checkpoint=False)
    with pytest.raises(InputError, match=r"new has no complete checkpoint yet; train\.py saves"):
        load_run(tmp_path / "new")
    for text in ("{", "[]", "{}", '{"model": 3}'):
        (tmp_path / "new" / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json is damaged"):
            load_run(tmp_path / "new")


def test_a_run_is_built_as_it_was_trained_unless_flags_say_otherwise(tmp_path):
    make_run(tmp_path, checkpoint=False, model=dict(multiple_of=2, dtype="bfloat16"))
    run = f"--workdir={tmp_path}"
    own = spec(run)
    assert (own.label, own.name, own.reducer) == (str(tmp_path), "vit", "evit")
    assert (own.keep_rate, own.layers, own.multiple_of) == (0.7, [1, 2], 2)
    sizes = MODEL | dict(patch_size=(4, 4), num_classes=10)
    settings = sizes | dict(keep_rate=0.7, multiple_of=2, dtype="bfloat16")
    assert own.build() == build_model("vit", **settings)
    assert own.build(keep_rate=1).keep == (None,) * 4
    assert own.build(keep_rate=0.5) == build_model("vit", **settings | dict(keep_rate=0.5))
    for argument, change in {
        "--layers=0,3": dict(layers=(0, 3)),
        "--reducer=random": dict(reducer="random"),
        "--dtype=float32": dict(dtype="float32"),
        "--multiple_of=1": dict(multiple_of=1),
        "--image_size=32,16": dict(image_size=(32, 16)),
    }.items():
        assert spec(run, argument).build() == build_model("vit", **settings | change)
    # A schedule of its own takes the place of the run's rate and layers.
    merged = settings | dict(reducer="tome:r=2", keep_rate=None, layers=None)
    assert spec(run, "--reducer=tome:r=2").build() == build_model("vit", **merged)
    merged |= dict(layers=(0, 1))
    assert spec(run, "--reducer=tome:r=2", "--layers=0,1").build() == build_model("vit", **merged)


def test_a_run_planned_by_counts_has_no_rate_but_takes_one(tmp_path):
    make_run(tmp_path, checkpoint=False, model=dict(keep_rate=None, tokens=(9, 5)))
    own = spec(f"--workdir={tmp_path}")
    assert own.keep_rate is None
    assert own.build().keep == (None, 9, 5, None)
    assert own.build(keep_rate=0.5).keep == (None, 8, 5, None)


def test_a_sandwich_is_built_at_its_smallest_rate(tmp_path):
    changes = dict(sandwich=(1.0, 0.5, 0.7), model=dict(keep_rate=None))
    make_run(tmp_path, checkpoint=False, **changes)
    assert spec(f"--workdir={tmp_path}").keep_rate == 0.5


def test_a_name_and_sizes_are_a_model_too():
    named = spec("--model=deit_tiny_patch16_224", "--image_size=32", "--num_classes=7")
    assert named.build() == build_model("deit_tiny_patch16_224", image_size=32, num_classes=7)
    assert (named.keep_rate, named.layers, named.reducer) == (None, None, "evit")
    sized = spec("--model=vit:width=16,depth=2,num_heads=2", "--layers=1", "--reducer=tome")
    expected = dict(width=16, depth=2, num_heads=2, reducer="tome", layers=(1,))
    assert sized.build(keep_rate=0.7) == build_model("vit", keep_rate=0.7, **expected)
    assert sized.label == "vit:width=16,depth=2,num_heads=2"


def test_weights_follow_the_image_size(tmp_path):
    params = make_run(tmp_path)
    larger = spec(f"--workdir={tmp_path}", "--image_size=32")
    model = larger.build()
    found = larger.load_params(model)
    assert found["pos_embed"].shape == (1, 65, 16)
    tensors = tensors_from_params(params, load_run(tmp_path).model)
    expected = params_from_tensors(tensors, model, found)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.ptp(found["pos_embed"]) > 0.1


def test_tools_that_only_measure_do_without_a_checkpoint(tmp_path):
    make_run(tmp_path / "new", checkpoint=False)
    new = spec(f"--workdir={tmp_path / 'new'}")
    assert new.run_params(new.build()) is None
    expected = make_run(tmp_path / "old")
    old = spec(f"--workdir={tmp_path / 'old'}")
    jax.tree.map(np.testing.assert_array_equal, old.run_params(old.build()), expected)
    named = spec("--model=vit")
    assert named.run_params(named.build()) is None


def test_flags_that_exclude_each_other_or_are_missing_are_one_line(tmp_path):
    make_run(tmp_path, checkpoint=False)
    run = f"--workdir={tmp_path}"
    for arguments, text in {
        (run, "--model=vit"): "leave out --model",
        (run, "--weights=x"): "leave out --weights",
        (run, "--num_classes=3"): "leave out --num_classes",
        (): "give --model=NAME, or --workdir=DIR of a training run",
        ("--model=vit",): "--weights=FILE is needed",
        ("--model=vit:keep_rate=0.5", "--weights=x"): "keep_rate is no size of the model",
        (run, "--multiple_of=1,8"): "--multiple_of takes one number here, got 1,8",
        (run, "--image_size=x"): "--image_size must be like 224",
        (run, "--layers=3;6"): "numbers with commas",
    }.items():
        with pytest.raises(InputError) as error:
            spec(*arguments, names=ALL).build()
        assert text in str(error.value)
        assert "\n" not in str(error.value)


def test_the_configuration_is_what_train_wrote(tmp_path):
    make_run(tmp_path, checkpoint=False)
    assert spec(f"--workdir={tmp_path}").config == json.loads(
        (tmp_path / "config.json").read_text()
    )
