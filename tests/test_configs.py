# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/, its :debug variant and the arguments they share."""

import importlib
from pathlib import Path

import pytest

from configs import common
from evit_jax.data import known_sources
from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.ranges import check_ranges
from evit_jax.recorder import flatten

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
RUNS = [name for name in NAMES if name != "common"]


def load(name, text=""):
    return importlib.import_module(f"configs.{name}").get_config(text)


@pytest.mark.parametrize("text", ["", "debug"])
@pytest.mark.parametrize("name", RUNS)
def test_every_config_describes_a_model_and_data_that_exist(name, text):
    config = load(name, text)
    assert build_model(**config.model).num_classes == config.model.num_classes
    assert config.data.name in known_sources()
    assert config.is_locked


@pytest.mark.parametrize("name", RUNS)
def test_configs_add_no_field_that_common_does_not_explain_but_model_sizes(name):
    known = set(flatten(common.get_config().to_dict()))
    sizes = {f"model.{size}" for size in ("patch_size", "width", "depth", "num_heads")}
    assert set(flatten(load(name).to_dict())) <= known | sizes


@pytest.mark.parametrize("name", RUNS)
def test_keep_rate_is_an_argument(name):
    assert load(name).model.keep_rate == 0.7
    assert load(name, "keep_rate=0.5").model.keep_rate == 0.5


@pytest.mark.parametrize("name", RUNS)
def test_the_docstring_says_how_to_run_it(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"python train.py --config=configs/{name}.py" in text


def test_other_plans_take_the_place_of_the_keep_rate():
    config = load("digits", "keep_rate=None")
    rates = dict(config.model) | dict(keep_rates=(1, 0.7, 1, 1, 0.5, 1))
    assert build_model(**rates).tokens_per_block == (65, 47, 47, 47, 25, 25)
    tome = dict(config.model) | dict(reducer="tome:r=5")
    assert build_model(**tome).tokens_per_block == (60, 55, 50, 45, 40, 35)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("run.log_every", 0, "must be 1 or more, got 0"),
        ("seed", -1, "must be 0 or more and at most"),
        ("epochs", 0.0, "must be above 0, got 0.0"),
        ("ema_decay", 1.0, "must be 0 or more and below 1"),
        ("augment.scale", (0.5,), "two numbers, the smaller first"),
        ("augment.ratio", (2.0, 1.0), "two numbers, the smaller first"),
        ("augment.scale", (0.5, 2.0), "above 0 and at most 1"),
    ],
)
def test_numbers_out_of_range_are_refused(field, value, text):
    flat = flatten(load("digits").to_dict())
    check_ranges(flat)
    with pytest.raises(InputError, match=f"{field} ") as error:
        check_ranges(flat | {field: value})
    assert text in str(error.value)


def test_unknown_arguments_name_the_closest():
    with pytest.raises(InputError, match="'keep_rat'; did you mean 'keep_rate'"):
        load("digits", "keep_rat=0.5")


def test_the_learning_rate_follows_the_batch_size():
    config = load("evit_deit_s")
    assert config.optimizer.lr == pytest.approx(1e-3)
    config.batch_size = 2048
    assert config.optimizer.lr == pytest.approx(2e-3)


def test_the_papers_tokens():
    model = build_model(**load("evit_deit_s").model)
    assert model.tokens_per_block == (197,) * 3 + (140,) * 3 + (100,) * 3 + (72,) * 3
