# SPDX-License-Identifier: Apache-2.0
"""`import evit_jax` and `python -m evit_jax`."""

import subprocess
import sys
from pathlib import Path

import pytest

import evit_jax
from evit_jax.models import build_model


def python(*arguments):
    """A process with these arguments, which has to succeed: its standard output."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def test_importing_the_package_waits_for_neither_optax_nor_orbax():
    code = "import sys, evit_jax; print('optax' in sys.modules, 'orbax' in sys.modules)"
    assert python("-c", code) == "False False\n"


def test_the_models_are_listed_by_pattern():
    assert evit_jax.list_models("deit_tiny*") == [
        "deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"
    ]  # fmt: skip
    names = evit_jax.list_models()
    assert names == sorted(names)
    assert {"vit", "deit_base_patch16_384", "vit_small_patch14_reg4_dinov2"} < set(names)
    assert "vit_base_patch16_224.mae" in evit_jax.list_models("vit_base*", tags=True)
    for name in evit_jax.list_models("deit_*"):
        assert build_model(name).depth == 12
    with pytest.raises(evit_jax.InputError) as error:
        evit_jax.list_models("deit_tinny*")
    text = "no model is called 'deit_tinny*'; the closest name is 'deit_tiny_patch16_224'"
    assert str(error.value) == text


def test_the_package_lists_its_tools_with_a_line_each():
    lines = python("-m", "evit_jax").splitlines()[2:]
    folder = Path(evit_jax.__file__).with_name("tools")
    tools = sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert [line.split()[:3] for line in lines] == [
        ["python", "-m", f"evit_jax.tools.{tool}"] for tool in tools
    ]
    for line, tool in zip(lines, tools, strict=True):
        said = line.split(maxsplit=3)[3]
        assert f'"""{said}\n' in (folder / f"{tool}.py").read_text()


def test_what_the_list_of_tools_is_not_asked_for_is_one_line():
    done = subprocess.run([sys.executable, "-m", "evit_jax", "x"], text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr == "error: unrecognized arguments: x; --help explains them\n"
