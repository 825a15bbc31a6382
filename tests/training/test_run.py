# SPDX-License-Identifier: Apache-2.0
import json

import jax
import pytest

from configs import common
from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.training.run import Calendar, Due, Profile, check_sandwich, use_plan_file


def calendar(**changes):
    config = common.get_config().unlock()
    config.update(dict(batch_size=10, epochs=2.0))
    config.run.update(log_every=3, eval_every=1.0, checkpoint_every=0.5)
    config.run.update(changes)
    return Calendar(config, images=80)


def test_what_is_due_after_a_step():
    days = calendar()
    assert (days.total, days.steps(0.5), days.at(4)) == (16, 4, dict(step=4, epoch=0.5))
    nothing = Due(log=False, evaluate=False, save=False, stop=False)
    assert days.due(1, stop=False) == nothing
    assert days.due(3, stop=False) == nothing._replace(log=True)
    assert days.due(4, stop=False) == nothing._replace(save=True)
    assert days.due(8, stop=False) == nothing._replace(evaluate=True, save=True)
    assert days.due(1, stop=True) == nothing._replace(save=True, stop=True)
    # The last step does everything, and nobody has to stop any more.
    assert days.due(16, stop=True) == Due(log=True, evaluate=True, save=True, stop=False)
    assert calendar(eval_every=0, checkpoint_every=0).due(8, stop=False) == nothing


def test_a_sandwich_of_a_method_that_learns_needs_a_rate_that_reduces():
    config = common.get_config()
    config.sandwich = (1.0, 0.5)
    sizes = dict(image_size=16, patch_size=4, width=16, depth=2, num_heads=2, num_classes=3)
    check_sandwich(config, build_model("vit", **sizes, reducer="cropr", keep_rate=0.5))
    check_sandwich(config, build_model("vit", **sizes, reducer="topk"))
    with pytest.raises(InputError, match=r"such as :keep_rate=0\.5"):
        check_sandwich(config, build_model("vit", **sizes, reducer="cropr"))


def test_a_plan_file_puts_its_counts_and_reducer_into_the_run_s_own_configuration(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(dict(reducer=dict(name="ward"), tokens=[None, 20, [12, 8], 1])))
    config = common.get_config()
    config.model.keep_rate = None
    config.model.plan = str(path)
    use_plan_file(config)
    assert config.model.tokens == (None, 20, (12, 8), 1)
    assert config.model.reducer.name == "ward"
    assert config.model.plan == ""
    before = config.to_json()
    use_plan_file(config)  # nothing left to do
    assert config.to_json() == before

    config.model.plan = str(path)
    config.model.tokens = None
    config.model.keep_rate = 0.7
    with pytest.raises(InputError, match=r"leave out model.keep_rate .*keep_rate=None"):
        use_plan_file(config)
    config.model.keep_rate = None
    config.model.plan = str(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"none\.json"):
        use_plan_file(config)


def test_some_steps_are_traced(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))

    class Log:
        def say(self, text):
            seen.append(text)

    def run(text, first=1):
        profile = Profile(text, tmp_path)
        for step in range(first, 8):
            profile.before(step)
            seen.append(step)
            profile.after(step, dict(loss=jax.numpy.zeros(())), Log())

    run("3:4")
    trace = str(tmp_path / "profile")
    assert seen[2:7] == [trace, 3, 4, "stop", f"wrote a trace of steps 3 to 4 to {trace}"]
    seen.clear()
    run("", first=6)
    run("3:6", first=5)  # resumed in the middle of them: no trace
    assert seen == [6, 7, 5, 6, 7]
    for wrong in ("3", "0:2", "4:3", "a:b"):
        with pytest.raises(InputError, match="such as 100:110"):
            Profile(wrong, tmp_path)
