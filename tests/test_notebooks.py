"""The notebooks of the docs run, show what is stored in them, and become pages of the site."""

import json
import os
from pathlib import Path

import nbformat
import pytest

from launching import program

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SAME_EVERYWHERE = "first-audit"
"""Nothing is trained in it, so that its numbers are those of any machine."""


def said(notebook):
    """What its cells printed."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output.text for output in outputs if output.output_type == "stream"]


def test_there_are_notebooks_and_they_are_small():
    assert {path.stem for path in NOTEBOOKS} == {"first-audit", "own-loop"}
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1_500_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, module_cache, monkeypatch):
    # The kernel is a process of its own: it finds the package where this one does.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    if path.stem != SAME_EVERYWHERE:
        # One round shows that it runs; what is stored in it are the numbers of six.
        whole, path = path.read_text("utf-8"), tmp_path / path.name
        assert whole.count("for number in range(6):") == 1
        path.write_text(whole.replace("for number in range(6):", "for number in range(1):"), "utf-8")
    again = program("tools/run_notebooks").run(path, tmp_path)
    if path.stem == SAME_EVERYWHERE:
        assert said(again) == said(nbformat.read(path, as_version=4))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_page_has_all_of_its_notebook(path):
    pytest.importorskip("mkdocs")
    notebook = nbformat.read(path, as_version=4)
    page = program("tools/docs_notebooks").as_markdown(json.loads(path.read_text("utf-8")), path.stem)
    for cell in notebook.cells:
        assert cell.source in page
        for output in cell.get("outputs", []):
            shown = output.text if output.output_type == "stream" else output.data.get("image/png", "")
            assert shown.strip() in page
