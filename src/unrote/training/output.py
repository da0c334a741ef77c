"""What a finished run leaves: a diffusers pipeline, the ledger, the model card."""

import shutil
from contextlib import nullcontext
from pathlib import Path

from unrote import __version__
from unrote.config import Config
from unrote.data.store import ImageStore
from unrote.files import atomic_path, write_json, write_text
from unrote.method.ledger import Ledger
from unrote.training.card import model_card
from unrote.training.privacy import privacy_spent
from unrote.training.run import Run
from unrote.training.sharding import WholeModel
from unrote.versions import RESULT_VERSION


def write_outputs(
    run: Run,
    config: Config,
    images: ImageStore,
    model: WholeModel,
    ledger: Ledger,
    steps: int,
    earlier: int | None = None,
) -> None:
    """Write ``model/``, ``ledger.csv``, ``README.md`` and, last, ``run.json``, which says that all is there.

    The weights are those after ``earlier`` samples; None is all that were seen.
    All that hold a part of the model call it; only the first writes.
    """
    columns = ledger.columns()
    if model.first:
        run.write_ledger(columns, images.names)
    save_model(run.model_folder, model)
    if not model.first:
        return
    visits, skips = int(columns["visits"].sum()), int(columns["skips"].sum())
    privacy = privacy_spent(config.training, len(images), steps)
    card = model_card(config, images, visits, skips, privacy, earlier)
    for folder in (run.model_folder, run.path):
        write_text(folder / "README.md", card)
    summary = {
        "schema_version": RESULT_VERSION,
        "unrote": __version__,
        "samples_seen": visits,
        "steps": steps,
        "skipped": skips,
        "augmented": int(columns["augmented"].sum()),
        "moved": int(columns["moves"].sum()),
    }
    write_json(run.path / "run.json", summary | privacy)


def save_model(folder: Path, model: WholeModel) -> None:
    """Write a folder that diffusers loads without this package; see :func:`write_outputs`.

    Its weights are the averaged ones, and those without averaging lie beside them; without EMA they are the only ones.
    """
    if model.first:
        shutil.rmtree(folder, ignore_errors=True)
    with atomic_path(folder) if model.first else nullcontext(folder) as temporary:
        for averaged in (True,) if model.ema is None else (False, True):
            with model.weights(averaged=averaged):
                if model.first:
                    (model.task.save if averaged else model.task.save_raw)(temporary)
