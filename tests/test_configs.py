# SPDX-License-Identifier: Apache-2.0
"""Every file in configs/, its :debug variant and the arguments they share."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest

from configs import common
from configs.learned import METHODS
from evit_jax import tables
from evit_jax.data import known_sources
from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.plan.flops import macs
from evit_jax.spec import flatten
from evit_jax.training.ranges import check_ranges
from tests.test_train import train

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
    assert build_model(**rates).tokens_per_block == (37, 28, 28, 28, 16, 16)
    tome = dict(config.model) | dict(reducer="tome:r=5")
    assert build_model(**tome).tokens_per_block == (32, 27, 22, 17, 12, 7)


def test_a_budget_and_multiples_are_fields_that_training_follows(tmp_path):
    budget = ["--config=configs/digits.py:debug,keep_rate=None", "--config.model.macs=1.5e6"]
    code, out, err = train(
        *budget, "--config.model.multiple_of=4", "--config.dry_run=True",
        "--config.keep_warmup.epochs=1", "--config.keep_warmup.rungs=2",
    )  # fmt: skip
    assert code == 0, err
    fields = dict(load("digits", "debug,keep_rate=None").model)
    model = build_model(**fields | dict(macs=1.5e6, multiple_of=4))
    stages = [line.split() for line in out.split("GMACs")[1].splitlines()[2:5]]
    assert stages[0][1:4] == ["1", "37", "x4"]
    assert stages[2][2:-1] == tables.runs(model.tokens_per_block).split()
    found = model.rate_within(macs=1.5e6, layers=fields["layers"], multiple_of=4)
    assert float(stages[2][1]) == pytest.approx(found, abs=5e-4)  # the rate that was found
    assert float(stages[2][-1]) == pytest.approx(macs(model) / 1e9, rel=1e-3)
    code, _, err = train(*budget, "--config.sandwich=(1.0,0.5)", f"--workdir={tmp_path}")
    assert (code, err.count("\n")) == (1, 1)
    assert "a sandwich takes the place of keep_warmup, keep_rates, tokens, macs" in err


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


@pytest.mark.parametrize("name", ["evit_deit", "evit_deit_finetune"])
def test_every_row_of_the_paper_that_deit_covers_is_an_argument(name):
    for size, width in (("tiny", 192), ("small", 384), ("base", 768)):
        for rate in (0.5, 0.6, 0.7, 0.8, 0.9):
            config = load(name, f"size={size},keep_rate={rate},fuse=False")
            model = build_model(**config.model)
            assert model.width == width
            assert model.reducer.extra == 0
            assert model.keep[3] == math.ceil(rate * 196)
    for pixels in (256, 288, 304):
        model = build_model(**load(name, f"image_size={pixels},keep_rate=0.5").model)
        assert model.patches == (pixels // 16) ** 2
        assert model.reducer.extra == 1


def test_the_recipe_is_deits():
    config = load("evit_deit")
    assert (config.epochs, config.label_smoothing, config.ema_decay) == (300, 0.1, 0.99996)
    optimizer = config.optimizer
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0.05, 0)
    assert (optimizer.warmup_epochs, optimizer.warmup_lr, optimizer.min_lr) == (5, 1e-6, 1e-5)
    assert dict(config.mix) == dict(erasing=0.25, mixup=0.8, cutmix=1.0, switch=0.5, token=0)
    augment = config.augment
    assert (augment.randaugment_magnitude, augment.randaugment_std) == (9, 0.5)
    assert (augment.randaugment_layers, augment.repeats, augment.scale) == (2, 3, (0.08, 1.0))
    assert config.model.drop_path_rate == 0.1
    assert (config.keep_warmup.start_epoch, config.keep_warmup.epochs) == (10, 100)
    tuned = load("evit_deit_finetune")
    assert (tuned.epochs, tuned.model.drop_path_rate, tuned.keep_warmup.epochs) == (30, 0, 0)
    assert tuned.optimizer.lr == pytest.approx(2 * 2e-5)  # at batch 1024
    assert tuned.optimizer.weight_decay == 1e-6


def test_the_recipe_is_lvvits():
    config = load("evit_lvvit")
    assert (config.epochs, config.label_smoothing, config.ema_decay) == (300, 0.1, 0.99992)
    assert config.optimizer.lr == pytest.approx(1.6e-3)
    assert (config.optimizer.weight_decay, config.optimizer.min_lr) == (0.05, 1e-5)
    mix = dict(erasing=0.25, mixup=0, cutmix=0, switch=0.5, token=1)
    assert dict(config.mix) == mix
    assert (config.augment.randaugment_magnitude, config.augment.repeats) == (9, 1)
    assert config.model.drop_path_rate == 0.1
    reducing = [i for i, keep in enumerate(build_model(**config.model).keep) if keep]
    assert reducing == [4, 8, 12]
    medium = build_model(**load("evit_lvvit", "size=medium").model)
    assert [i for i, keep in enumerate(medium.keep) if keep] == [5, 10, 15]


def test_the_recipe_is_deit3s_in_each_of_its_stages():
    config = load("deit3")
    assert (config.loss, config.label_smoothing, config.batch_size) == ("bce", 0, 2048)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.clip_norm) == ("lamb", 4e-3, 1)
    assert (config.augment.three_augment, config.augment.color_jitter) == (True, 0.3)
    assert (config.model.drop_path, config.model.drop_path_rate) == ("constant", 0.05)
    model = build_model(**config.model)
    assert {model.block_settings(i)["drop_path_rate"] for i in range(model.depth)} == {0.05}
    base = load("deit3", "model=base")
    assert (base.model.image_size, base.optimizer.lr) == ((192, 192), 3e-3)
    tuned = load("deit3", "model=large,stage=finetune_384")
    assert tuned.model.image_size == (384, 384)
    assert (tuned.loss, tuned.label_smoothing, tuned.optimizer.name) == ("ce", 0.1, "adamw")
    assert (tuned.optimizer.lr, tuned.optimizer.weight_decay) == (1e-5, 0.1)
    assert tuned.model.drop_path_rate == 0.4
    with pytest.raises(InputError, match="small has no stage finetune_224"):
        load("deit3", "stage=finetune_224")
    with pytest.raises(InputError, match="did you mean 'pretrain'"):
        load("deit3", "stage=pretrained")


def test_cifar10_has_a_small_setting_for_processors():
    config = load("cifar10", "cpu,keep_rate=1")
    assert macs(build_model(**config.model)) == 22_611_328  # as docs/results.md has it
    assert (config.epochs, config.batch_size, config.data.cache) == (3.0, 64, True)


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_learn_have_equal_budgets_and_the_teacher_they_start_from(method):
    config = load("learned", f"method={method}")
    model = build_model(**config.model)
    assert type(model.reducer).__module__ == f"evit_jax.reducers.{method}"
    three = build_model(**dict(load("evit_deit").model) | dict(reducer="topk"))
    if method in ("cropr", "diffrate_search", "stvit"):
        assert 0.98 * macs(three) < macs(model) <= macs(three)
    else:
        assert model.tokens_per_block == three.tokens_per_block
    assert (config.distill.teacher == "") == (method in ("cropr", "diffrate_search"))
    if config.distill.teacher:
        config.weights = "deit.safetensors"
        assert config.distill.weights == "deit.safetensors"
        assert config.distill.teacher == config.model.name
    if method == "sit":  # cross entropy, KL and token loss as 1 : 2 : 2
        assert model.reducer.recovers
        parts = (1 - config.distill.alpha, config.distill.alpha, config.distill.tokens)
        np.testing.assert_allclose(parts, np.array([1, 2, 2]) / 3)
    assert (config.optimizer.backbone_lr < 1) == (
        method in ("dynamicvit", "cropr", "diffrate_search")
    )
    with pytest.raises(InputError, match="unknown method 'dynamicvi'; did you mean 'dynamicvit'"):
        load("learned", "method=dynamicvi")
