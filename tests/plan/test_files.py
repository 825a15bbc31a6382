# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.plan.files import read_plan

SIZES = dict(image_size=16, patch_size=4, width=16, depth=3, num_heads=2, num_classes=3)


def test_a_model_takes_counts_and_reducer_from_a_plan_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(dict(reducer="tome", tokens=[None, 10, [8, 6]], note="other")))
    model = build_model("vit", **SIZES, plan=str(path))
    assert model.kept == (None, 10, (8, 6))
    assert type(model.reducer).__name__ == "ToMe"
    with pytest.raises(InputError, match="a plan has its own counts"):
        build_model("vit", **SIZES, plan=str(path), keep_rate=0.7)


@pytest.mark.parametrize("content", ["[1]", "{", '{"tokens": [1]}', '{"reducer": "evit"}'])
def test_what_is_no_plan_says_what_one_is(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(InputError, match="is no plan: it has to be a JSON object"):
        read_plan(path)


def test_counts_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(dict(reducer="evit", tokens=[None, 99, None])))
    with pytest.raises(InputError, match="can keep 1 to 16 of them"):
        build_model("vit", **SIZES, plan=str(path))
