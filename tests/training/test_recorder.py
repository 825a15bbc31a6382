# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from evit_jax.errors import InputError
from evit_jax.spec import flatten
from evit_jax.training.recorder import Recorder
from evit_jax.training.workdir import broken, open_workdir

CONFIG = dict(seed=0, model=dict(keep_rate=0.7, layers=(1, 2)), run=dict(log_every=5))


def record(workdir, step, *figures):
    recorder = Recorder(workdir, step=step, total=100)
    for figure in figures:
        recorder.write(dict(epoch=0.5) | figure)
    recorder.close()


def steps_in(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()]


def test_figures_go_to_json_lines_people_and_tensorboard(tmp_path, capsys):
    record(tmp_path, 0, dict(step=10, train_loss=2.5, train_top1=0.125, keep_rate=0.7))
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line == dict(step=10, epoch=0.5, train_loss=2.5, train_top1=0.125, keep_rate=0.7)
    text = capsys.readouterr().out
    assert text == "step 10/100  epoch 0.5  loss 2.5000  top-1 12.5%  keep 0.7\n"
    assert any((tmp_path / "tensorboard").iterdir())


def test_steps_taken_again_replace_their_lines(tmp_path):
    record(tmp_path, 0, dict(step=10), dict(step=20), dict(step=30), dict(step=30, final=True))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')  # killed while writing
    record(tmp_path, 20, dict(step=30))
    assert steps_in(tmp_path) == [10, 20, 30]
    record(tmp_path, 30, dict(step=30, final=True))
    record(tmp_path, 30, dict(step=30, final=True))
    assert steps_in(tmp_path) == [10, 20, 30, 30]


def test_other_processes_write_nothing(tmp_path, capsys):
    recorder = Recorder(tmp_path, step=0, total=1, active=False)
    recorder.write(dict(step=1, epoch=1))
    recorder.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_workdir_belongs_to_one_recipe(tmp_path):
    open_workdir(tmp_path, CONFIG)
    open_workdir(tmp_path, CONFIG)
    open_workdir(tmp_path, CONFIG | dict(run=dict(log_every=50)))  # no result depends on it
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    other = CONFIG | dict(model=dict(keep_rate=0.5, layers=(1, 2)))
    with pytest.raises(InputError, match=r"model.keep_rate is 0.7 there and 0.5 here; use another"):
        open_workdir(tmp_path, other)


def test_a_new_field_at_its_default_is_the_same_recipe(tmp_path):
    open_workdir(tmp_path, CONFIG)
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    defaults = CONFIG | dict(novel=dict(rate=0.0, sizes=(1, 2)), unread=1)
    open_workdir(tmp_path, CONFIG | dict(novel=dict(rate=0.0, sizes=(1, 2))), defaults=defaults)
    changed = dict(novel=dict(rate=0.5, sizes=(1, 2)))
    with pytest.raises(InputError, match=r"novel.rate is 0.0 there and 0.5 here; use"):
        open_workdir(tmp_path, CONFIG | changed, defaults=defaults)


def test_a_recipe_may_change_until_something_is_saved(tmp_path):
    open_workdir(tmp_path, CONFIG)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    open_workdir(tmp_path, CONFIG | dict(seed=1))
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_of_several_processes_one_writes_and_all_check(tmp_path):
    open_workdir(tmp_path / "run", CONFIG, write=False)
    assert not (tmp_path / "run").exists()
    open_workdir(tmp_path, CONFIG)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(InputError, match="seed is 0 there and 1 here"):
        open_workdir(tmp_path, CONFIG | dict(seed=1), write=False)


def test_a_damaged_image_is_named_once(tmp_path, capsys):
    source = {3: dict(name="a/3.jpg"), 7: dict(name="a/7.jpg")}
    recorder = Recorder(tmp_path, step=0, total=1, train=source)
    for damaged in ([True, False], [True, True], [False, True]):
        recorder.see(dict(index=np.array([3, 7]), damaged=np.array(damaged)))
    assert recorder.count_damaged() == dict(damaged_images=4)
    assert recorder.count_damaged() == {}
    recorder.see(dict(index=np.array([0]), damaged=np.array([True])), {0: dict(name="a/3.jpg")})
    assert recorder.count_damaged() == dict(damaged_images=1)
    recorder.close()
    assert capsys.readouterr().out.splitlines() == [
        "skipped damaged image 1: a/3.jpg",
        "skipped damaged image 2: a/7.jpg",
    ]


def test_a_step_that_is_not_finite_is_told_with_all_one_needs(tmp_path):
    figures = dict(loss=float("nan"), grad_norm=1.0)
    error = str(broken(tmp_path, 12, figures, list(range(20)), 10))
    for text in ("step 12 is not finite (loss nan, grad_norm 1.0)", "that of step 10",
                 "number 0, 1, 2, 3, 4, 5, 6, 7, ... of"):  # fmt: skip
        assert text in error
    kept = json.loads((tmp_path / "broken_batch.json").read_text())
    assert kept == dict(step=12, indices=list(range(20)))
    error = str(broken(tmp_path / "gone", 1, figures, [4], None))  # and cannot be written
    assert "no checkpoint yet; its images are number 4 of" in error


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json is damaged"):
        open_workdir(tmp_path, CONFIG)


def test_checkpoints_of_nobody_knows_what_are_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"no config.json"):
        open_workdir(tmp_path, CONFIG)


def test_flatten_names_nested_keys_with_dots():
    assert flatten(CONFIG) == {
        "seed": 0,
        "model.keep_rate": 0.7,
        "model.layers": (1, 2),
        "run.log_every": 5,
    }
