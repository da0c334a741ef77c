"""Does the copy come back? An adversarial search for named training images, after something was done against it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unrote.auditing.intervals import wilson_interval
from unrote.data import ImageStore
from unrote.detection.reconstruction import reconstructions
from unrote.errors import InputError
from unrote.guards.copy_filter import CopyFilter
from unrote.guards.index import DEFAULT_RATIO, PixelIndex, is_copy
from unrote.guards.making import Sources, make_guards
from unrote.guards.prompts import EmbeddingNoise
from unrote.sampling import (
    Denoiser,
    Weights,
    asks_for_text,
    load_unet,
    pipeline_of,
    text_sampler,
    trained_size,
    weights_variant,
)
from unrote.seeding import derive_seed
from unrote.text.generation import PromptDenoiser, load_text_to_image
from unrote.text.prompts import Prompt
from unrote.training.run import Run
from unrote.versions import RESULT_VERSION

PERTURBATION = 0.1
"""Deviation of the noise on prompt embeddings, as small as what training mitigations use (Somepalli et al. 2023)."""

Batches = Iterator[np.ndarray]


@dataclass(frozen=True)
class Settings:
    """How a re-test searches.

    Attributes:
        tries: samples that are looked at for each image; of models with one text encoder half of them with noise on
            the embedding.
        seed: of everything random; other noises than those of ``unrote sample`` at the same seed.
        steps: denoising steps, of DDIM; of flow matching models Euler's.
        batch_size: images denoised at once.
        threshold: below this neighbour ratio a sample is a copy of its nearest training image.
        guidance_scale: with prompts.
        reconstruct: also start from the noised image itself; without prompts only.
    """

    tries: int = 256
    seed: int = 0
    steps: int = 50
    batch_size: int = 32
    threshold: float = DEFAULT_RATIO
    guidance_scale: float = 7.5
    reconstruct: bool = True

    def __post_init__(self) -> None:
        if self.tries < 1 or self.steps < 1 or self.batch_size < 1:
            raise InputError("tries, steps and batch_size must be at least 1")


def retest(
    model: Run | Path | str,
    targets: Sequence[int],
    train: Any = None,
    *,
    fingerprints: Sequence[str] = (),
    holdout: Any = None,
    settings: Settings | None = None,
    guards: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Search the samples of a model for training images that should not come back.

    From noise: samples of a model without text are compared with all targets at once, of a class-conditional one those
    of each class with the targets of that class; a text-to-image model is given
    each target's own caption, half of the time with a little noise on its embedding; where several text encoders share
    the text (SDXL, Stable Diffusion 3, FLUX) the caption alone, as one noise is not equally little to each. A target is
    found by a sample whose nearest training image it is (or a duplicate of it), over the augmentation orbit, at a ratio
    below the threshold.

    From the image: of models without text, the noised target is denoised from ever lower noise, the stronger attack of
    somebody who has the image already. What comes back at low noise comes back from any model, so the same is done to
    held-out images: see :mod:`unrote.detection.reconstruction`.

    Args:
        model: a run folder, or a folder or Hub id of a diffusers pipeline.
        targets: positions among the training images.
        train: the training images; by default those of the run.
        fingerprints: of the images that the positions are of, where they are known: others are not searched.
        holdout: images that were not trained on, the control of the reconstruction; as many are used as there are
            targets.
        settings: how to search.
        guards: at work while searching; see docs/guards.md.
        device: where to compute.

    Returns:
        JSON-able: ``images``, one entry a target, with ``found_after`` (tries, or None), ``tries``, ``upper`` (the 95 %
        upper bound of the chance per try; Wilson) and ``reconstruction``; ``controls``; settings.

    Raises:
        InputError: no such model, images or targets, the images have another fingerprint, or a target has no caption or
            class to ask for it.
    """
    settings = settings or Settings()
    source, run = pipeline_of(model)
    weights: Weights = "ema" if run is None or run.config.training.use_ema else "raw"
    denoise: Denoiser | PromptDenoiser
    seed = derive_seed(settings.seed, "retest")
    options: dict[str, Any] = {"steps": settings.steps, "guidance_scale": settings.guidance_scale, "seed": seed}
    if asks_for_text(source, run):
        pipeline = load_text_to_image(source, run, weights_variant(run, weights)).to(device)
        _, pipeline.scheduler = text_sampler(pipeline.scheduler, None, settings.steps)
        options["size"] = trained_size(run)
        denoise = PromptDenoiser(pipeline, [Prompt("")], **options)
    else:
        unet, schedule = load_unet(source, run, weights)
        denoise = Denoiser(unet.to(device).eval(), schedule, "ddim", settings.steps, 0.0, seed)
    images = Sources(run, denoise.shape).train("retest", train)
    wanted = _checked(targets, images, fingerprints)
    index = PixelIndex(images, threshold=settings.threshold)
    # Once, for all targets: what is at work in the UNet would otherwise be there as often as it is made.
    copy_filter = make_guards(guards, denoise, run, train=images, seed=settings.seed, device=device).copy_filter
    if isinstance(denoise, PromptDenoiser):
        asked = {target: _asked(denoise, images, target, copy_filter, settings, options) for target in wanted}
        after = [_found(index, [target], samples)[0] for target, samples in asked.items()]
    else:
        after = _found_by_class(index, wanted, images, denoise, copy_filter, settings)
    rows = [_row(images, target, tries, settings.tries) for target, tries in zip(wanted, after, strict=True)]
    controls: list[dict[str, Any]] = []
    if settings.reconstruct and isinstance(denoise, Denoiser):
        others = None if holdout is None else Sources(run, denoise.shape).opened(holdout)
        rows, controls = _reconstructed(rows, images, others, denoise, settings)
    return {
        "schema_version": RESULT_VERSION,
        "method": "retest",
        "model": str(source),
        "images": rows,
        "controls": controls,
        "found": sum(row["found_after"] is not None for row in rows),
        "guards": list(guards),
        "train_fingerprint": images.fingerprint,
        "settings": {name: getattr(settings, name) for name in Settings.__dataclass_fields__},
    }


def _checked(targets: Sequence[int], images: ImageStore, fingerprints: Sequence[str]) -> list[int]:
    """The targets once each. Raises InputError if there are none, one is no position, or they are of other images."""
    if set(fingerprints) - {images.fingerprint}:
        count, (height, width) = len(images), images.images.shape[1:3]
        raise InputError(
            f"{images.source}: these {count:,} images at {height}x{width} are others than those whose report or ledger "
            "says which to search for, so that its positions may name others: give --train those, audit again without "
            "--limit and --resolution if it had them, or name some by --index"
        )
    if not targets:
        raise InputError("there are no images to search for; give --index, --from-report or --most-skipped")
    wrong = [target for target in targets if not 0 <= target < len(images)]
    if wrong:
        raise InputError(f"--index {wrong[0]}: there are {len(images):,} training images, 0 to {len(images) - 1:,}")
    return list(dict.fromkeys(targets))


def _found_by_class(
    index: PixelIndex,
    wanted: Sequence[int],
    images: ImageStore,
    denoise: Denoiser,
    copy_filter: CopyFilter | None,
    settings: Settings,
) -> list[int | None]:
    """After how many tries each target was found, of a class-conditional model all with the target's own class."""
    classes = denoise.networks[0].config.num_class_embeds
    labels: Any = [None] * len(images)
    if classes:
        if images.labels is None:
            raise InputError(f"{images.source}: the model has {classes} classes, and these images have none")
        labels = images.labels.tolist()
        strange = [target for target in wanted if not 0 <= labels[target] < classes]
        if strange:
            raise InputError(
                f"--index {strange[0]}: {images.names[strange[0]]} is of class {labels[strange[0]]}, and the model has "
                f"classes 0 to {classes - 1}"
            )
    after: dict[int, int | None] = {}
    for label in dict.fromkeys(labels[target] for target in wanted):
        denoise.label = label
        part = [target for target in wanted if labels[target] == label]
        after |= zip(part, _found(index, part, _sampled(_make(denoise, copy_filter), settings)), strict=True)
    return [after[target] for target in wanted]


Made = Callable[[Sequence[int]], np.ndarray]


def _make(denoise: Any, copy_filter: CopyFilter | None) -> Made:
    """What makes images, and makes copies again if there is a filter."""
    if copy_filter is None:
        return lambda indices: np.asarray(denoise(indices))
    return lambda indices: copy_filter(denoise, indices)[0]


def _sampled(make: Made, settings: Settings, start: int = 0, num: int | None = None) -> Batches:
    """The samples of tries ``start``, … in whole batches."""
    num = settings.tries if num is None else num
    for first in range(start, start + num, settings.batch_size):
        yield make(range(first, first + settings.batch_size))[: start + num - first]


def _asked(
    denoise: PromptDenoiser,
    images: ImageStore,
    target: int,
    copy_filter: CopyFilter | None,
    settings: Settings,
    options: dict[str, Any],
) -> Batches:
    """Samples of the target's own caption, then with a little noise on its embedding if there is one encoder."""
    caption = None if images.captions is None else images.captions[target]
    if not caption:
        raise InputError(f"--index {target}: {images.names[target]} has no caption to ask the model for it")
    several = getattr(denoise.pipeline, "text_encoder_2", None) is not None
    half = settings.tries if several else -(-settings.tries // 2)
    asking = PromptDenoiser(denoise.pipeline, [Prompt(caption)], **options)
    own = denoise.guards
    for start, num, noise in ((0, half, []), (half, settings.tries - half, [EmbeddingNoise(PERTURBATION)])):
        asking.guards = replace(own, embeddings=[*own.embeddings, *noise])
        yield from _sampled(_make(asking, copy_filter), settings, start, num)


def _found(index: PixelIndex, targets: Sequence[int], batches: Batches) -> list[int | None]:
    """After how many tries each target was found; ends as soon as all are."""
    clusters = index.references.clusters
    after: dict[int, int] = {}
    seen = 0
    for images in batches:
        values, nearest = index(images)
        copies = is_copy(index, values)
        for target in (target for target in targets if target not in after):
            hits = np.flatnonzero(copies & (clusters[nearest] == clusters[target]))
            if len(hits):
                after[target] = seen + int(hits[0]) + 1
        seen += len(images)
        if len(after) == len(targets):
            break
    return [after.get(target) for target in targets]


def _row(images: ImageStore, target: int, after: int | None, tries: int) -> dict[str, Any]:
    """One target. Found at try n, the chance is bounded from one success in n; otherwise from none in all tries."""
    count, total = (0, tries) if after is None else (1, after)
    row = {"index": target, "name": str(images.names[target]), "found_after": after, "tries": total}
    return row | {"upper": wilson_interval(count, total)[1], "reconstruction": None}


def _reconstructed(
    rows: list[dict[str, Any]], images: ImageStore, holdout: ImageStore | None, denoise: Denoiser, settings: Settings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Targets and controls with what comes back from their noised selves."""
    targets = [row["index"] for row in rows]
    unet, scheduler, _ = denoise.guided
    found, others = reconstructions(
        unet,
        scheduler,
        images,
        targets,
        holdout,
        threshold=settings.threshold,
        seed=settings.seed,
        batch_size=settings.batch_size,
    )
    return [row | {"reconstruction": one} for row, one in zip(rows, found, strict=True)], others
