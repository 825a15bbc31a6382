# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

import evit_jax
from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.plan.flops import macs
from evit_jax.tools import evaluate, learned_plan
from tests.support.trained_run import MODEL, make_run

SEARCH = dict(reducer="diffrate_search", layers=None, keep_rate=0.7)


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls a tool in this process: the JSON object of its last line."""

    def call(tool, *arguments):
        monkeypatch.setattr("sys.argv", ["tool", *map(str, arguments)])
        tool.main()
        return json.loads(capsys.readouterr().out.strip().rpartition("\n")[2])

    return call


def test_a_runs_learned_counts_are_a_plan_that_every_tool_takes(call, tmp_path):
    make_run(tmp_path / "run", model=SEARCH)
    plan = tmp_path / "plan.json"
    figures = call(learned_plan, f"--workdir={tmp_path / 'run'}", f"--out={plan}")
    content = json.loads(plan.read_text())
    assert content["reducer"] == "diffrate"
    assert content["tokens"] == figures["tokens"]
    # Next to zero, so every block would keep half of the 16 patches, or up to 10 of them.
    assert figures["tokens"][0] is None
    assert 8 <= figures["tokens"][1][-1] <= 11
    sizes = {name: value for name, value in MODEL.items() if name != "layers"}
    model, _ = evit_jax.create_model("vit", plan=plan, patch_size=4, num_classes=10, **sizes)
    assert macs(model) == figures["macs"] < figures["dense"]
    dense = build_model("vit", patch_size=4, num_classes=10, **sizes)
    assert macs(dense) == figures["dense"]
    dense, found = call(evaluate, f"--workdir={tmp_path / 'run'}", f"--plan={plan}")["results"]
    assert (dense["keep_rate"], found["keep_rate"]) == (1.0, None)
    assert np.isfinite(found["loss"])


def test_another_run_has_learned_no_counts(call, tmp_path):
    make_run(tmp_path)
    with pytest.raises(InputError, match="was trained with EViT, which learns no counts"):
        call(learned_plan, f"--workdir={tmp_path}", f"--out={tmp_path / 'plan.json'}")


def test_a_run_with_a_reducer_that_learned_is_evaluated_at_every_rate(call, tmp_path):
    make_run(tmp_path, model=dict(reducer="dynamicvit", keep_rate=0.7))
    results = call(evaluate, f"--workdir={tmp_path}")["results"]
    assert [row["keep_rate"] for row in results] == [1.0, 0.7]
    dense = call(evaluate, f"--workdir={tmp_path}", "--keep_rate=1")["results"]
    np.testing.assert_allclose(dense[0]["loss"], results[0]["loss"], rtol=1e-5)
