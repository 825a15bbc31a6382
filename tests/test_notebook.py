# SPDX-License-Identifier: Apache-2.0
"""notebooks/: it runs from top to bottom, and what is committed is whole, small and nobody's."""

import base64
import io
import re
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from tests.scripts.run_notebook import NOTEBOOK, WIDGET, executed

LARGEST = 600_000  # bytes


@pytest.fixture
def committed():
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs(notebook):
    return [out for cell in notebook.cells for out in cell.get("outputs", ())]


def pictures(notebook):
    """Decoded pictures of all outputs, in order."""
    found = []
    for output in outputs(notebook):
        for kind in ("image/png", "image/jpeg"):
            if data := output.get("data", {}).get(kind):
                found.append(Image.open(io.BytesIO(base64.b64decode(data))))
    return found


def said(notebook, cell):
    """What the cell of this name printed."""
    [cell] = [one for one in notebook.cells if one.id == cell]
    return "".join(out.text for out in cell.outputs if out.output_type == "stream")


def test_the_committed_notebook_is_whole_and_small(committed):
    nbformat.validate(committed)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for out in outputs(committed) if out.output_type == "error"]
    assert NOTEBOOK.stat().st_size < LARGEST
    assert len(pictures(committed)) == 6
    assert "widgets" not in committed.metadata
    assert not [out for out in outputs(committed) if WIDGET in out.get("data", {})]


def test_the_committed_notebook_ran_with_weights_and_names_no_machine(committed):
    printed = "".join(out.text for out in outputs(committed) if out.output_type == "stream")
    assert "5,717,416 parameters" in printed
    assert "random weights" not in printed
    assert not re.search(r"/(home|root|work|tmp|content|Users)/|Warning", printed)
    top1 = float(re.search(r"test top-1 ([\d.]+)%", said(committed, "result"))[1])
    assert top1 > 95
    assert float(said(committed, "load").split()[-1]) < 1e-3


def test_links_of_the_notebook_lead_somewhere(committed):
    text = "\n".join(cell.source for cell in committed.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) >= 7
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


def test_every_photograph_has_its_line_of_credits():
    folder = NOTEBOOK.parent / "photos"
    names = {path.name for path in folder.glob("*.jpg")}
    assert set(re.findall(r"^\| `(.+?)` \|", (folder / "README.md").read_text(), re.M)) == names


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("EVIT_NOTEBOOK", "small")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for name in ("EVIT_WEIGHTS", "EVIT_IMAGES"):
        monkeypatch.delenv(name, raising=False)
    notebook = executed()
    assert not [out for out in outputs(notebook) if out.output_type == "error"]
    assert "(37, 37, 37, 37)" in said(notebook, "model")
    shares = [float(share) for share in re.findall(r"([\d.]+) GMACs", said(notebook, "compare"))]
    assert len(shares) == 3
    assert max(shares) < 1.02 * min(shares)  # the plans cost the same
    assert re.search(r"test top-1 [\d.]+% with", said(notebook, "result"))
    assert float(said(notebook, "load").split()[-1]) < 1e-4
    names = {Path(file).name for file in re.findall(r"\S+\.stablehlo", said(notebook, "export"))}
    assert names == {"model.stablehlo"}
    assert len(pictures(notebook)) == len(pictures(nbformat.read(NOTEBOOK, as_version=4)))
