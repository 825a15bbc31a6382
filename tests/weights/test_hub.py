# SPDX-License-Identifier: Apache-2.0
"""Weights of the hub; its library is replaced, so that nothing is asked of the network."""

import json
import sys
import types
import warnings

import pytest
from ml_collections import ConfigDict

from evit_jax.errors import InputError
from evit_jax.training.workdir import pin_weights
from evit_jax.weights import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch):
    """What the hub was asked; it answers with paths as its cache has them."""
    asked = []

    def answer(repository, file=None, *, revision, allow_patterns=None):
        asked.append((repository, file, revision))
        assert file or "model.safetensors" in allow_patterns
        folder = f"/cache/models--{repository.replace('/', '--')}/snapshots/{revision or COMMIT}"
        return f"{folder}/{file}" if file else folder

    library = types.SimpleNamespace(hf_hub_download=answer, snapshot_download=answer)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    return asked


def test_a_name_with_a_commit_is_taken_silently(asked):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert hub.download("hf:timm/deit@0123abc:weights.pth").endswith("0123abc/weights.pth")
        assert hub.download("hf:timm/deit@0123abc").endswith("snapshots/0123abc")
    assert asked == [("timm/deit", "weights.pth", "0123abc"), ("timm/deit", None, "0123abc")]


@pytest.mark.parametrize("file", ["", ":a/b.pth"])
def test_a_name_without_a_commit_warns_once_and_says_which_it_got(asked, file):
    name, exact = f"hf:timm/deit.fb_in1k{file}", f"hf:timm/deit.fb_in1k@{COMMIT}{file}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            hub.download(name)
    assert [exact in str(warning.message) for warning in caught] == [True]
    with pytest.warns(UserWarning, match="may be other weights tomorrow"):
        assert hub.pinned(name) == exact
    assert hub.pinned(exact) == exact
    assert hub.pinned("file.pth") == "file.pth"
    assert hub.pins(name, exact)
    assert not hub.pins(exact, exact)
    assert not hub.pins("hf:timm/other", exact)


@pytest.mark.filterwarnings("ignore:hf.*may be other weights tomorrow")
def test_a_run_records_the_commit_and_keeps_it_when_it_is_resumed(asked, tmp_path):
    def config():
        return ConfigDict(dict(weights="hf:o/student", distill=dict(weights="hf:o/teacher:w.pth")))

    first = config()
    pin_weights(first, str(tmp_path))
    assert first.weights == f"hf:o/student@{COMMIT}"
    assert first.distill.weights == f"hf:o/teacher@{COMMIT}:w.pth"
    before = first.to_dict() | dict(weights="hf:o/student@fedcba9")
    (tmp_path / "config.json").write_text(json.dumps(before))
    asked.clear()
    resumed = config()
    pin_weights(resumed, str(tmp_path))
    assert (resumed.weights, resumed.distill.weights) == (
        "hf:o/student@fedcba9",
        first.distill.weights,
    )
    assert asked == []
    local = ConfigDict(dict(weights="w.pth", distill=dict(weights="")))
    pin_weights(local, None)
    assert local.weights == "w.pth"


def test_what_goes_wrong_says_what_to_do(monkeypatch):
    for name in ("hf:timm", "hf:timm/deit@main"):
        with pytest.raises(InputError, match="not of the form hf:OWNER/REPOSITORY@COMMIT"):
            hub.download(name)

    def refuse(*arguments, **settings):
        raise OSError("cannot reach the hub\nmore")

    library = types.SimpleNamespace(hf_hub_download=refuse, snapshot_download=refuse)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    for name in ("hf:timm/deit@0123abc:weights.pth", "hf:timm/deit"):
        with pytest.raises(InputError, match=r"cannot reach the hub\).*give the file's path"):
            hub.download(name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r'needs the extra "hub"'):
        hub.download("hf:timm/deit@0123abc")
