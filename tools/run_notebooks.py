"""Run the notebooks of the docs and keep what they show: ``python tools/run_notebooks.py docs/notebooks/*.ipynb``."""

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run in ``folder``; its file is left as it is.

    Raises:
        CellExecutionError: if a cell raises.
    """
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=300, resources=where, record_timing=False, coalesce_streams=True).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(_shown, cell.outputs) if output is not None]
    # Versions of whoever ran it last would be a change in every run.
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def _shown(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Without what libraries warn of, and without the second picture of each."""
    if output.get("name") == "stderr":
        return None
    output.get("data", {}).pop("image/jpeg", None)
    return output


def main() -> None:
    """Run and write each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", type=Path, nargs="+")
    for path in parser.parse_args().notebooks:
        nbformat.write(run(path, path.parent), path)
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
