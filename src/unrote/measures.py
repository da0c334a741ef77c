"""What ``import unrote`` offers to measure: audit, scan, membership, prompts. Needs no training code."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unrote.auditing import AuditReport
from unrote.auditing import audit as _audit
from unrote.auditing.prompted import read_origins
from unrote.data import ImageStore, open_images
from unrote.data.build import cache_folder
from unrote.data.store import count_trained_on
from unrote.detection.membership import attacked_timesteps, labelled_as, pia_scores
from unrote.detection.prompts import load_pipeline, prompt_scores, read_prompts
from unrote.detection.roc import separation
from unrote.device import pick_device
from unrote.encoders import load_encoder
from unrote.errors import InputError
from unrote.files import read_object
from unrote.scanning.scan import ScanReport
from unrote.scanning.scan import scan as _scan
from unrote.training.images import training_images
from unrote.training.run import Run


def audit(
    generated: Any,
    train: Any,
    holdout: Any = None,
    *,
    encoders: Sequence[Any] = (),
    clip_model: Path | str | None = None,
    resolution: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    resume: Path | None = None,
    distributed: bool = False,
    name: str | None = None,
    **settings: Any,
) -> AuditReport:
    """Measure what generated images copy from the training images.

    Args:
        generated: anything :func:`unrote.open_images` takes, or a run (its ``samples``).
        train: the training images; of a run, those that it was trained on, with its ledger.
        holdout: images of the same kind that were not trained on: the control.
        encoders: feature spaces besides random convolutions: what :func:`unrote.load_encoder` takes (``"sscd"`` for
            copy detection, ``"inception"`` for FID), or any callable from uint8 [n, H, W, C] to [n, D].
        clip_model: folder or Hub id of a CLIP model, to score how well generated images fit their captions.
        resolution: compare at this size; by default that of the generated images.
        limit: only this many training images, the fixed choice that ``data.limit`` makes.
        device: for encoders: ``cpu``, ``cuda``, …; by default what there is.
        resume: folder that keeps the progress of the searches, so that the same call goes on after it was killed.
        distributed: see :func:`unrote.auditing.audit`.
        name: what to call the generated images.
        settings: ``num_neighbors``, ``flip``, ``max_shift``, ``scales``, ``brightness``, ``near_duplicates``,
            ``false_positive_rate`` and ``seed`` of :func:`unrote.auditing.audit`.

    Raises:
        InputError: if sets are empty, unreadable or do not fit together, or an encoder is not there.
    """
    where = str(pick_device(device))
    spaces = [load_encoder(encoder, device=where) for encoder in encoders]
    source_run, train_run = _as_run(generated), _as_run(train)
    samples = source_run.path / "samples" if source_run else generated
    if source_run and not samples.exists():
        raise InputError(
            f"{source_run.path}: has no samples yet; run `unrote sample {source_run.path} --num 256` first"
        )
    channels = train_run.config.data.channels if train_run else 3
    images = open_images(samples, resolution=resolution, channels=channels)
    side = images.images.shape[1]
    if train_run:
        known = _known_images(train_run)
        reference = known if limit is None else known.limit(limit)
        ledger = train_run.read_ledger() if limit is None else None
    else:
        reference, ledger = open_images(train, resolution=side, channels=channels, limit=limit), None
    control = None if holdout is None else open_images(holdout, resolution=side, channels=channels)
    return _audit(
        images,
        reference,
        control,
        encoders=spaces,
        clip_model=None if clip_model is None else str(clip_model),
        device=where,
        ledger=ledger,
        origins=read_origins(samples, images.names),
        provenance=_provenance(samples),
        cache=cache_folder() / "features",
        resume=resume,
        distributed=distributed,
        name=name or (source_run.config.method if source_run else str(samples)),
        **settings,
    )


def scan(
    data: Any,
    holdout: Any = None,
    *,
    run: Run | Path | str | None = None,
    resolution: int | None = None,
    max_shift: int = 2,
    seed: int = 0,
) -> ScanReport:
    """Look at images before training: duplicates, leaks, unusable ones, and a ranking by risk of memorization.

    Args:
        data: anything :func:`unrote.open_images` takes.
        holdout: images that must not be among them.
        run: a finished run on exactly these images; its ledger sharpens the ranking.
        resolution: compare at this size; by default their own, for folders 64 pixels.
        max_shift: duplicates may be shifted by up to so many pixels.
        seed: of the images that isolation is measured against, when there are more than 20,000.

    Raises:
        InputError: if data cannot be read, or the run was trained on other images.
    """
    trained = None if run is None else Run(Path(run))
    if trained is not None and not trained.finished:
        raise InputError(f"{trained.path}: is not a finished run; train it to its end first, or scan without it")
    images = _scanned(data, resolution)
    control = None if holdout is None else _scanned(holdout, images.images.shape[1])
    if trained is not None and list(training_images(trained.config).names) != list(images.names):
        raise InputError(f"{trained.path} was not trained on exactly the images of {images.source}")
    return _scan(images, control, max_shift=max_shift, seed=seed, ledger=trained.read_ledger() if trained else None)


def membership(run: Run | Path | str, holdout: Any, *, seed: int = 0, device: str | None = None) -> dict[str, Any]:
    """Test on the loss whether the run's images can be told from held-out ones, by PIA (Kong et al.).

    Args:
        run: a finished run.
        holdout: images of the same kind that were not trained on.
        seed: of the bootstrap.
        device: ``cpu``, ``cuda``, …; by default what there is.

    Returns:
        JSON-able: AUC, TPR at 1 % FPR, their 95 % intervals, counts and provenance.
    """
    # Here and not above: diffusers takes seconds to import, and the other measures do without.
    from unrote.sampling import load_unet

    trained, where = Run(Path(run)), pick_device(device)
    if not trained.finished:
        raise InputError(f"{trained.path}: is not a finished run; train it to its end first")
    members = _known_images(trained)
    others = open_images(holdout, resolution=members.images.shape[1], channels=members.images.shape[3])
    shared = count_trained_on(others, members)
    unet, schedule = load_unet(trained.model_folder, None, "ema")
    unet = unet.to(where).eval()
    if unet.config.num_class_embeds is not None:
        others = labelled_as(others, members)
    scores = [
        pia_scores(unet, schedule.alphas_cumprod, store, prediction_type=schedule.config.prediction_type, device=where)
        for store in (members, others)
    ]
    origin = {
        "run": str(trained.path),
        "weights": "ema" if trained.config.training.use_ema else "raw",
        "holdout": others.source,
        "shared": shared,
        "seed": seed,
    }
    prints = {"train_fingerprint": members.fingerprint, "holdout_fingerprint": others.fingerprint}
    timesteps = list(attacked_timesteps(len(schedule.alphas_cumprod)))
    return {"method": "pia", "timesteps": timesteps, **separation(*scores, seed=seed), **origin, **prints}


def rank_prompts(
    pipeline: Any, prompts: Path | str | Sequence[str], *, device: str | None = None, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """Prompts by how strongly they steer a text-to-image model; see :func:`unrote.prompt_scores`.

    Args:
        pipeline: a folder or Hub id of a diffusers pipeline, or a pipeline.
        prompts: texts, or a file of them: one a line, or ``.jsonl`` with ``text``.
        device: ``cpu``, ``cuda``, …; by default what there is. A pipeline that is given stays where it is.
        seed: of the noises.
        options: of :func:`unrote.prompt_scores`.

    Returns:
        JSON-able: ``prompts`` with ``rank``, ``index``, ``prompt``, ``score``, …, the strongest first, and settings.
    """
    texts = read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else list(prompts)
    named = isinstance(pipeline, str | Path)
    scores = prompt_scores(
        load_pipeline(str(pipeline), pick_device(device)) if named else pipeline, texts, seed=seed, **options
    )
    order = sorted(range(len(scores)), key=lambda index: -scores[index].score)
    rows = [{"rank": rank, "index": index, **asdict(scores[index])} for rank, index in enumerate(order, 1)]
    settings = {"pipeline": str(pipeline) if named else type(pipeline).__name__, "seed": seed, **options}
    return {"method": "prediction-norm", **settings, "prompts": rows}


def _scanned(data: Any, resolution: int | None) -> ImageStore:
    """Files of any size are made small; what has one size keeps it."""
    folder = isinstance(data, str | Path) and Path(data).is_dir()
    return open_images(data, resolution=64 if folder and resolution is None else resolution)


def _as_run(what: Any) -> Run | None:
    if isinstance(what, Run):
        return what
    if isinstance(what, str | Path) and (Path(what) / "config.yaml").exists():
        return Run(Path(what))
    return None


def _known_images(run: Run) -> ImageStore:
    """The images that ``run`` was trained on. Raises InputError if they have changed since."""
    try:
        images = training_images(run.config)
    except InputError as error:
        raise InputError(f"{run.path}: its training images, looked for from {Path.cwd()}: {error}") from None
    if images.fingerprint != run.data["fingerprint"]:
        raise InputError(f"{run.path}: {run.config.data.source} no longer holds the images it was trained on")
    return images


def _provenance(samples: Any) -> dict[str, Any]:
    """How the images were sampled, if we sampled them."""
    if not isinstance(samples, str | Path):
        return {}
    path = Path(samples)
    file = path.with_name(f"{path.stem}.sampling.json") if path.suffix == ".npz" else path / "sampling.json"
    if not file.exists():
        return {}
    settings = read_object(file, "remove it, and nothing is known of how they were made")
    return {key: value for key, value in settings.items() if key != "schema_version"}
