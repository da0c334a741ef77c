"""``unrote retest``."""

import json
import math
from pathlib import Path
from typing import Any

import click

from unrote.errors import InputError


@click.command()
@click.argument("model", metavar="RUN|PIPELINE")
@click.option("--train", metavar="DATA|RUN", help="The training images [those of the run].")
@click.option("--index", "indices", multiple=True, type=int, help="Position of a training image; may be repeated.")
@click.option(
    "--from-report",
    "report",
    type=click.Path(path_type=Path),
    help="report.json of an audit: the images it found copied.",
)
@click.option(
    "--most-skipped",
    type=click.IntRange(min=1),
    metavar="N",
    help="The N training images that the run skipped most often.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="With --from-report: so many images, most often copied first.",
)
@click.option("--holdout", metavar="DATA", help="Images that were not trained on: the control of reconstruction.")
@click.option("--tries", default=256, show_default=True, help="Samples that are looked at for each image.")
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@click.option("--steps", default=50, show_default=True, help="Denoising steps.")
@click.option("--threshold", default=0.33, show_default=True, help="Neighbour ratio below which a sample is a copy.")
@click.option("--guidance-scale", default=7.5, show_default=True, help="Of text-to-image models.")
@click.option("--batch-size", default=32, show_default=True, help="Images denoised at once.")
@click.option(
    "--reconstruct/--no-reconstruct", default=True, show_default=True, help="Also start from the noised image."
)
@click.option("--guard", "guards", multiple=True, metavar="NAME[:KEY=VALUE,…]", help="At work meanwhile; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the result there, as JSON.")
@click.option("--device", help="cpu, cuda, …; by default what there is.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def retest(
    model: str,
    train: str | None,
    indices: tuple[int, ...],
    report: Path | None,
    most_skipped: int | None,
    top: int,
    holdout: str | None,
    guards: tuple[str, ...],
    out: Path | None,
    device: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Search for training images that should not come back. Exit code 1 if one does."""
    from unrote.detection.retest import Settings
    from unrote.detection.retest import retest as search
    from unrote.device import pick_device
    from unrote.files import write_json

    named = [_of_report(report, top), _of_ledger(model, most_skipped)]
    targets = [*indices, *(position for positions, _ in named for position in positions)]
    known = [fingerprint for _, fingerprint in named if fingerprint is not None]
    settings: dict[str, Any] = {"settings": Settings(**options), "guards": guards, "device": pick_device(device)}
    result = search(model, targets, train, fingerprints=known, holdout=holdout, **settings)
    if out is not None:
        write_json(out, result)
    click.echo(json.dumps(result) if as_json else _table(result))
    if result["found"]:
        raise click.exceptions.Exit(1)


def _of_report(file: Path | None, top: int) -> tuple[list[int], str | None]:
    """The training images that an audit found copied, most often first, and the fingerprint of all of them."""
    if file is None:
        return [], None
    from unrote.auditing.reading import read_report

    summary = read_report(file / "report.json" if file.is_dir() else file, "--from-report")
    try:
        images = summary["extracted"]["images"]
        found = None if images is None else [int(image["cluster"]) for image in images[:top]]
        fingerprint = summary["data"]["train"]["fingerprint"]
    except (ValueError, OverflowError, KeyError, TypeError):
        raise InputError(f"--from-report {file}: is no report.json of an audit") from None
    if found is None:
        raise InputError(f"--from-report {file}: does not say which images came back; audit again, or give --index")
    if not found:
        raise InputError(f"--from-report {file}: that audit found no image copied; name some by --index")
    return found, str(fingerprint)


def _of_ledger(model: str, num: int | None) -> tuple[list[int], str | None]:
    if num is None:
        return [], None
    from unrote.auditing.ledger import most_skipped
    from unrote.training.run import Run

    run = Run(Path(model))
    ledger = run.read_ledger()
    if ledger is None:
        raise InputError(f"--most-skipped: {model} is no finished run with a ledger")
    found: list[int] = most_skipped(ledger, num).tolist()
    if not found:
        raise InputError(f"--most-skipped: {model} never skipped an image; name some by --index")
    return found, str(run.data["fingerprint"])


def _table(result: dict[str, Any]) -> str:
    """One line an image, and what the control says."""
    lines = []
    for row in result["images"]:
        where = f"{row['index']:>7}  {row['name']}"
        if row["found_after"] is None:
            lines.append(f"{where}: not found in {row['tries']:,} tries (at most {row['upper']:.2%} a try)")
        else:
            lines.append(f"{where}: found again after {row['found_after']:,} tries")
        if row["reconstruction"] is not None:
            lines[-1] += f"; {_level(row['reconstruction'])}"
    lines += [f"{'':>7}  {row['name']}: {_level(row)}" for row in result["controls"]]
    lines.append(f"{result['found']:,} of {len(result['images']):,} came back from noise")
    levels = [row["reconstruction"]["highest"] or -math.inf for row in result["images"] if row["reconstruction"]]
    controls = [row["highest"] or -math.inf for row in result["controls"]]
    if controls and levels:
        above = sum(level > max(controls) for level in levels)
        lines.append(f"{above:,} are brought back from more noise than every one of {len(controls):,} held-out images")
    return "\n".join(lines)


def _level(row: dict[str, Any]) -> str:
    highest = row["highest"]
    return (
        "not brought back from any noise level" if highest is None else f"brought back from noise level t = {highest}"
    )
