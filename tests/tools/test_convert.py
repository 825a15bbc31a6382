# SPDX-License-Identifier: Apache-2.0
"""What convert leaves out; test_evaluate.py has how people run it."""

import json
import sys

import jax
import numpy as np
from safetensors.numpy import save_file

import evit_jax
from evit_jax.tools import convert
from evit_jax.training.trained import load_run
from evit_jax.weights.names import tensors_from_params
from tests.support.trained_run import make_run


def test_convert_leaves_out_what_recovered_tokens_in_training(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out.safetensors"
    model = dict(reducer="sit:recovery=True", keep_rate=0.7, depth=2, layers=(1,))
    params = make_run(tmp_path / "run", model=model)
    assert ["recovery" in params[f"blocks_{number}"] for number in (0, 1)] == [False, True]
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "run"), str(out)])
    convert.main()
    capsys.readouterr()
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    _, plain = evit_jax.create_model(weights=str(out), **settings | dict(reducer="sit"))
    _, again = evit_jax.create_model(weights=str(out), **settings)
    for number in (0, 1):
        ours = params[f"blocks_{number}"]
        without = {name: tree for name, tree in ours.items() if name != "recovery"}
        jax.tree.map(np.testing.assert_array_equal, plain[f"blocks_{number}"], without)
        fresh = again[f"blocks_{number}"]
        jax.tree.map(np.testing.assert_array_equal, fresh | without, fresh)
        if "recovery" in ours:  # begins anew
            kernels = (tree["recovery"]["fc1"]["kernel"] for tree in (ours, fresh))
            assert not np.array_equal(*kernels)
    save_file(tensors_from_params(params, load_run(tmp_path / "run").model), out)
    _, again = evit_jax.create_model(weights=str(out), **settings)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    _, same = evit_jax.create_model(weights=str(out), **settings | dict(reducer="sit"))
    jax.tree.map(np.testing.assert_array_equal, same, plain)
