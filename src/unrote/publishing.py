"""A finished run on the Hugging Face Hub: the model where diffusers looks for it, and its card."""

import json
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from unrote.errors import InputError, first_line
from unrote.training.card import of_repository
from unrote.training.run import Run


def files_to_push(folder: Path | str, repository: str) -> dict[str, Path | bytes]:
    """What :func:`push_run` uploads: path in the repository → file, or content.

    The model as it is, but for the paths that diffusers notes in its configurations, and its card with the
    repository's name in the example. Neither the configuration nor the ledger: they name paths and training images.

    Raises:
        InputError: if the folder is no finished run or its model or card is gone, or the repository's name is none.
    """
    folder = Path(folder)
    run = Run(folder)
    if not (run.config and run.finished):  # the first raises where there is none
        raise InputError(f"{folder}: the run is not finished; give the same `unrote train` command again, then push")
    _check_name(repository)
    model = run.model_folder
    found = [path for path in sorted(model.rglob("*")) if path.is_file() and path != model / "README.md"]
    card = folder / "README.md"
    if not found or not card.is_file():
        gone = card if found else model
        raise InputError(f"{gone} is gone, though the run is finished; put it back, or train again into another folder")
    files = {path.relative_to(model).as_posix(): _without_origin(path) for path in found}
    return files | {"README.md": of_repository(card.read_text("utf-8"), repository).encode()}


def push_run(folder: Path | str, repository: str, *, private: bool = True) -> str:
    """Upload a finished run in one commit; the repository is made if there is none. Returns the commit's address.

    Args:
        folder: the run folder.
        repository: ``owner/name``.
        private: of a repository that is made now.

    Raises:
        InputError: see :func:`files_to_push`, or the Hub refuses or is not reached; there is no commit then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    files = files_to_push(folder, repository)
    api: Any = HfApi()
    adds = [CommitOperationAdd(name, file) for name, file in files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, adds, commit_message="Model trained with unrote")
    except _hub_errors() as error:
        raise InputError(f"{repository}: {_why(error, Path(folder))}") from None
    return str(commit.commit_url)


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    owner, slash, name = repository.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise InputError(f"{repository}: a repository of the Hub is written OWNER/NAME")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(f"{repository}: is no name of a repository of the Hub: {first_line(error)}") from None


def _without_origin(path: Path) -> Path | bytes:
    """A file of the model; of a configuration, without where on this machine it was loaded from."""
    if path.suffix != ".json":
        return path
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError:
        return path
    if not isinstance(content, dict) or "_name_or_path" not in content:
        return path
    del content["_name_or_path"]
    return (json.dumps(content, indent=2) + "\n").encode()


def _hub_errors() -> tuple[type[Exception], ...]:
    """What the Hub's client raises: its own kinds, and those of the HTTP library that its version is built on."""
    from huggingface_hub import errors

    http: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return http, OSError, ValueError


def _why(error: Exception, folder: Path) -> str:
    """What went wrong, and the way out."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is not asked, since HF_HUB_OFFLINE is set: unset it, then push again"
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403):
        return f"the Hub refuses: {first_line(error)}. Log in with `hf auth login`, with a token that may write there"
    if isinstance(error, HfHubHTTPError) and 400 <= status < 500:
        return f"the Hub refuses: {first_line(error)}"
    if isinstance(error, ValueError) and not isinstance(error, JSONDecodeError):
        said = " ".join(str(error).split())
        return f"the Hub does not take it: {said}. Mend the lines at the top of {folder / 'README.md'}, then push again"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} can't be read: {error.strerror}"
    return f"the Hub does not answer ({first_line(error)}): look at the network and HF_ENDPOINT, then push again"
