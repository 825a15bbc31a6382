# SPDX-License-Identifier: Apache-2.0
"""Imports point down only, one file knows about devices, one about Orbax, and files stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A file imports from lower floors, or from its own folder.
FLOORS = (
    {"errors"},
    {"spec", "storage", "tables"},
    {"plan", "weights", "runtime", "pictures"},
    {"tokens", "cli", "data"},
    {"reducers"},
    {"models"},
    {"training", "export"},
    {"measure"},
    {"tools", "__init__", "__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted((ROOT / "evit_jax").rglob("*.py"))


def part_of(path):
    """The room: the file or folder of evit_jax that a file belongs to."""
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
    room = part_of(path)
    ours = {name.split(".")[1] for name in imported(path) if name.startswith("evit_jax.")} - {room}
    assert {other for other in ours if FLOOR[other] >= FLOOR[room]} == set()


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
    assert mentions("jit", "pmap", "Mesh", "NamedSharding", "shard_map") == {"runtime/parallel.py"}
    assert mentions("orbax") == {"training/checkpoint.py"}


def test_data_needs_neither_jax_nor_flax_nor_tensorflow():
    for path in FILES:
        roots = {name.split(".")[0] for name in imported(path)}
        # One format is TensorFlow's own, and only its two functions import it.
        assert "tensorflow" not in roots or path.name == "savedmodel.py"
        assert "torch" not in roots
        if part_of(path) in ("data", "plan", "pictures"):
            assert not roots & {"jax", "flax", "optax"}


def lines_of_code(path):
    """Lines with code in them: prose, blank lines and comments are free."""
    text = path.read_text()
    prose = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return sum(bool(line) and line[0] != "#" and number not in prose for number, line in lines)


@pytest.mark.parametrize("folder", ["evit_jax", "configs", "tests"])
def test_no_file_is_over_300_lines_of_code(folder):
    assert [path for path in (ROOT / folder).rglob("*.py") if lines_of_code(path) > 300] == []


def test_requirements_leave_tensorflow_and_torch_out():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {line.split(">")[0].split()[0].lower() for line in lines if line and line[0] != "#"}
    assert {"jax", "flax", "optax", "tensorflow-datasets", "ml-collections"} <= names
    assert not names & {"tensorflow", "tensorflow-cpu", "torch", "torchvision"}
