"""A finished run on the Hugging Face Hub: the model where diffusers looks for it, and its card."""

from pathlib import Path
from typing import Any

from unrote.errors import InputError
from unrote.training.run import Run


def files_to_push(folder: Path, repository: str) -> dict[str, Path | bytes]:
    """What :func:`push_run` uploads: path in the repository → file, or content.

    The model as it is, and its card with the repository's name in the example. Neither the configuration nor the
    ledger: they name paths and training images.

    Raises:
        InputError: if the folder is no finished run, or the repository's name is none.
    """
    run = Run(folder)
    base = run.config.model.pretrained if run.config.model.train == "lora" else None
    if not run.finished:
        raise InputError(f"{folder}: the run is not finished; give the same `unrote train` command again, then push")
    owner, slash, name = repository.partition("/")
    if not (owner and slash and name) or "/" in name:
        raise InputError(f"{repository}: a repository of the Hub is written OWNER/NAME")
    card = (folder / "README.md").read_text("utf-8")
    call = "load_lora_weights" if base is not None else "from_pretrained"
    card = card.replace(f'{call}("model")', f'{call}("{repository}")').replace("`model/`", "The repository")
    card = card.replace(
        " `config.yaml` has every setting, `ledger.csv` what the method saw of each\ntraining image.", ""
    )
    model = run.model_folder
    files: dict[str, Path | bytes] = {
        path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()
    }
    return files | {"README.md": card.encode()}


def push_run(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload a finished run in one commit; the repository is made if there is none. Returns the commit's address.

    Args:
        folder: the run folder.
        repository: ``owner/name``.
        private: of a repository that is made now.

    Raises:
        InputError: see :func:`files_to_push`, or the Hub refuses; nothing is uploaded then.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    files = files_to_push(folder, repository)
    api: Any = HfApi()
    adds = [CommitOperationAdd(name, file) for name, file in files.items()]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, adds, commit_message="Model trained with unrote")
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise InputError(
            f"{repository}: the Hub refuses: {str(error).strip().splitlines()[0]}. Log in with `hf auth login`, with a "
            "token that may write there"
        ) from None
    return str(commit.commit_url)
