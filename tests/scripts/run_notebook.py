# SPDX-License-Identifier: Apache-2.0
"""Runs notebooks/evit_in_ten_minutes.ipynb and saves it with its outputs, as it is committed.

    EVIT_WEIGHTS=deit_tiny.safetensors python -m tests.scripts.run_notebook

Needs the extra "test". The pictures in it are of notebooks/photos alone unless EVIT_IMAGES names a
folder. Widgets are left out: GitHub shows no slider, and what they hold is a copy of a picture.
tests/test_notebook.py executes it in the same way with EVIT_NOTEBOOK=small.
"""

import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "evit_in_ten_minutes.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"


def executed() -> nbformat.NotebookNode:
    """The notebook, run from top to bottom in a new kernel of this Python.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = dict(metadata=dict(path=str(NOTEBOOK.parent)))
    settings = dict(timeout=None, kernel_name="python3", coalesce_streams=True)
    NotebookClient(notebook, resources=folder, **settings).execute()
    return notebook


def without_widgets(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without outputs that are widgets, their state, and the times at which cells ran."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = dict(name="python")  # not which version
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
    return notebook


def main() -> None:
    nbformat.write(without_widgets(executed()), NOTEBOOK)
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", NOTEBOOK], check=True)
    print(f"{NOTEBOOK.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
