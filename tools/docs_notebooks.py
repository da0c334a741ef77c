"""Shows notebooks on the documentation site as pages like others, with the outputs that are stored in them.

A plugin that turns a notebook into HTML would take it out of the site's checks of links, and out of its colours.
"""

import json
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

LINK = re.compile(r"\]\((notebooks/[\w-]+)\.ipynb\)")
"""To a notebook from a page: GitHub shows the notebook itself, the site its page."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Each notebook becomes a page; its file stays, to be downloaded."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = file.src_uri.removesuffix("ipynb") + "md"
        files.append(File.generated(config, page, content=as_markdown(json.loads(file.content_string), file.name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to notebooks lead to their pages."""
    return LINK.sub(r"](\1.md)", markdown)


def as_markdown(notebook: dict[str, Any], name: str) -> str:
    """A notebook of format 4: text as it is, code in fences, and under each what it showed."""
    parts = []
    for cell in notebook["cells"]:
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts += [_fenced(source, "python"), *map(_output, cell["outputs"])]
    return "\n\n".join([*parts, f"[This page as a notebook]({name}.ipynb)"])


def _output(output: dict[str, Any]) -> str:
    """Pictures as pictures, tables as tables, everything else as text."""
    if output["output_type"] == "stream":
        return _fenced(_text(output["text"]), "text")
    shown = output["data"]
    if "image/png" in shown:
        return f'<img alt="output" src="data:image/png;base64,{_text(shown["image/png"]).strip()}">'
    if "text/html" in shown:
        # An empty line would end the block, and indentation make it code.
        return "\n".join(line.strip() for line in _text(shown["text/html"]).splitlines() if line.strip())
    return _fenced(_text(shown["text/plain"]), "text")


def _text(lines: str | list[str]) -> str:
    return lines if isinstance(lines, str) else "".join(lines)


def _fenced(code: str, language: str) -> str:
    return f"```{language}\n{code.rstrip()}\n```"
