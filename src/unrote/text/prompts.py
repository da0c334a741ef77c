"""Files of prompts."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from unrote.data.folder import printable
from unrote.errors import InputError
from unrote.files import check_letters, parse_json, text_lines

MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class Prompt:
    """A text to make images from.

    Attributes:
        text: what the model reads.
        seed: for ``torch.Generator().manual_seed``; None leaves it to the seed of the sampling.
        origin: name of the training image whose caption the text is.
    """

    text: str
    seed: int | None = None
    origin: str | None = None


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts of a ``.txt`` file, one a line, or of a ``.jsonl`` file of objects such as a ``metadata.jsonl``.

    An object has ``text`` (or ``prompt``), a string or a list of strings that are a prompt each; it may have ``seed``
    and ``file_name``, the training image that the text belongs to.

    Raises:
        InputError: unreadable, or without any prompt.
    """
    try:
        lines = text_lines(file)
    except InputError as error:
        raise InputError(f"--prompts {file}: {error}") from None
    read = _from_json if file.suffix == ".jsonl" else lambda line, _: [Prompt(line.strip())]
    written = [(line, f"--prompts {file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    prompts = [prompt for line, where in written for prompt in read(line, where)]
    if not prompts:
        raise InputError(f"--prompts {file}: has no prompts; write one a line")
    return prompts


def _from_json(line: str, where: str) -> list[Prompt]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None
    text = row.get("text", row.get("prompt")) if isinstance(row, dict) else None
    texts: list[Any] = text if isinstance(text, list) else [text]
    if not texts or not all(isinstance(one, str) for one in texts):
        raise InputError(f'{where}: needs a JSON object with a "text"')
    check_letters(texts, where)
    return [Prompt(one, _seed(row, where), _origin(row, where)) for one in texts]


def _seed(row: dict[str, Any], where: str) -> int | None:
    seed = row.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed <= MAX_SEED):
        raise InputError(f'{where}: "seed" must be a whole number from 0 to {MAX_SEED}, not {seed!r}')
    return seed


def _origin(row: dict[str, Any], where: str) -> str | None:
    """The name that the image has in a data set made from the folder of the file."""
    name = row.get("file_name")
    if name is not None and not isinstance(name, str):
        raise InputError(f'{where}: "file_name" must be a string, not {type(name).__name__}')
    return printable(str(PurePosixPath(name))) if name else None
