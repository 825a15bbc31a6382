# SPDX-License-Identifier: Apache-2.0
"""Imports point down only, one file knows about devices, one about Orbax, and files stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"errors", "spec"}  # anybody may import these
ALLOWED = {
    "errors": set(),
    "spec": set(),
    "plan": set(),
    "timetable": {"plan"},
    "flops": set(),
    "losses": set(),
    "metrics": set(),
    "optim": set(),
    "timing": set(),
    "background": set(),
    "startup": set(),
    "compilation_cache": set(),
    "ranges": set(),
    "preprocessing": set(),
    "data": set(),
    "parallel": set(),
    "checkpoint": set(),
    "budget": {"flops", "parallel", "plan", "timing"},
    "report": {"flops"},
    "recorder": {"report"},
    "cli": {"compilation_cache", "parallel", "recorder"},
    "reducers": {"plan"},
    "models": {"reducers", "plan", "flops", "preprocessing"},
    "mix": set(),
    "teachers": {"losses", "models", "preprocessing"},
    "steps": {"losses", "metrics", "mix", "preprocessing"},
    "predict": {"data", "models", "preprocessing"},
    "tools": {
        "budget",
        "cli",
        "data",
        "flops",
        "metrics",
        "mix",
        "models",
        "optim",
        "parallel",
        "plan",
        "preprocessing",
        "predict",
        "recorder",
        "reducers",
        "report",
        "steps",
        "timing",
        "checkpoint",
    },
    "__init__": {"budget", "models", "predict", "reducers"},
}
FILES = sorted((ROOT / "evit_jax").rglob("*.py"))


def part_of(path):
    """The file or subpackage of evit_jax that a file belongs to."""
    return path.relative_to(ROOT / "evit_jax").parts[0].removesuffix(".py")


def imported(path):
    """Full names of the modules, or things in them, that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    part = part_of(path)
    allowed = ALLOWED[part] | LEAVES | {part}
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("evit_jax.")}
    assert ours <= allowed


def mentions(*words):
    """The files of the package whose code uses one of these names."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (getattr(node, field, None) for field in ("id", "attr", "name", "module"))
            if any(word in str(name).split(".") for name in names if name for word in words):
                found.add(path.relative_to(ROOT / "evit_jax").as_posix())
    return found


def test_one_file_knows_about_devices_and_one_about_orbax():
    assert mentions("jit", "pmap", "Mesh", "NamedSharding", "shard_map") == {"parallel.py"}
    assert mentions("orbax") == {"checkpoint.py"}


def test_data_needs_neither_jax_nor_flax_nor_tensorflow():
    for path in FILES:
        roots = {name.split(".")[0] for name in imported(path)}
        assert "tensorflow" not in roots
        assert "torch" not in roots
        if part_of(path) in ("data", "plan", "timetable", "flops"):
            assert not roots & {"jax", "flax", "optax"}


@pytest.mark.parametrize("folder", ["evit_jax", "configs", "tests"])
def test_no_file_is_over_300_lines(folder):
    long = [p for p in (ROOT / folder).rglob("*.py") if len(p.read_text().splitlines()) > 300]
    assert long == []


def test_requirements_leave_tensorflow_and_torch_out():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {line.split(">")[0].split()[0].lower() for line in lines if line and line[0] != "#"}
    assert {"jax", "flax", "optax", "tensorflow-datasets", "ml-collections"} <= names
    assert not names & {"tensorflow", "tensorflow-cpu", "torch", "torchvision"}
