"""From ``--guard`` to the guards around a sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unrote.data import ImageStore, open_images
from unrote.data.build import cache_folder
from unrote.encoders import load_encoder
from unrote.errors import InputError
from unrote.guards.attention import AttentionReweighting
from unrote.guards.copy_filter import CopyFilter
from unrote.guards.embeddings import PromptOptimization
from unrote.guards.guidance import AntiMemorizationGuidance, Embed
from unrote.guards.index import DEFAULT_RATIO, FeatureIndex, PixelIndex, TrainingIndex, calibrate
from unrote.guards.prompts import EmbeddingNoise, RepeatWords, random_tokens
from unrote.guards.spec import Spec, parse_guard
from unrote.models.pixels import as_floats
from unrote.scanning.duplicates import near_clusters
from unrote.training.images import training_images
from unrote.training.run import Run


@dataclass
class Guards:
    """The guards around one sampling.

    Attributes:
        copy_filter: what checks finished images; None without one.
        others: what is at work while images are denoised.
        handles: whose ``remove()`` takes out what is at work in the UNet.
    """

    copy_filter: CopyFilter | None = None
    others: list[Any] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def settings(self) -> list[dict[str, Any]]:
        """What the images depend on, JSON-able."""
        every = [*self.others, *([] if self.copy_filter is None else [self.copy_filter])]
        return [guard.settings() for guard in every]


@dataclass(frozen=True)
class Sources:
    """Where images to compare with come from.

    Attributes:
        run: the run that the model belongs to, if any: its training images are the default.
        shape: height, width and channels of what is generated.
        default: other images to be the default.
    """

    run: Run | None
    shape: tuple[int, int, int]
    default: Any = None

    def train(self, guard: str, asked: Any) -> ImageStore:
        """The training images that ``asked`` names, or those of the run.

        Raises:
            InputError: there are none to take, or they have another size than what is generated.
        """
        asked = self.default if asked is None else asked
        if asked is None and self.run is None:
            raise InputError(f"--guard {guard}: needs the training images; add train=DATA")
        images = self.opened(asked) if asked is not None else self._of(self.run)
        if images.images.shape[1:] != self.shape:
            there, here = ("x".join(map(str, shape)) for shape in (images.images.shape[1:], self.shape))
            raise InputError(f"--guard {guard}: training images are {there}, what is generated is {here}")
        return images

    def opened(self, data: Any) -> ImageStore:
        """The images of ``data`` at the size of what is generated."""
        if isinstance(data, ImageStore):
            return data
        if isinstance(data, str | Path) and (run := Run(Path(data))).finished:
            return self._of(run)
        return open_images(data, resolution=self.shape[0], channels=1 if self.shape[2] == 1 else 3)

    @staticmethod
    def _of(run: Run | None) -> ImageStore:
        assert run is not None
        images = training_images(run.config)
        if images.fingerprint != run.data["fingerprint"]:
            raise InputError(f"{run.path}: {run.config.data.source} no longer holds the images it was trained on")
        return images


def make_guards(
    texts: Sequence[str],
    denoise: Any,
    run: Run | None,
    *,
    train: Any = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Guards:
    """The guards that ``texts`` name, at work in ``denoise``.

    Args:
        texts: ``NAME[:key=value,…]`` each; see docs/guards.md.
        denoise: :class:`unrote.sampling.Denoiser` or :class:`unrote.text.generation.PromptDenoiser`.
        run: the run that the model belongs to; None for another pipeline.
        train: the training images where a guard names none; by default those of the run.
        seed: of the sampling.
        device: where encoders compute.

    Raises:
        InputError: a guard or a setting is unknown, given twice, out of range, or needs something that is not there.
    """
    specs = [parse_guard(text) for text in texts]
    names = [spec.name for spec in specs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--guard {twice[0]}: is given twice")
    sources, guards = Sources(run, denoise.shape, train), Guards()
    for spec in specs:
        values: dict[str, Any] = spec.values
        if spec.name == CopyFilter.name:
            guards.copy_filter = _copy_filter(spec, sources, seed, str(device))
        elif spec.name == AntiMemorizationGuidance.name:
            guards.others.append(_guidance(values, denoise, sources, guards.handles, device))
        else:
            guards.others.append(_text_guard(spec.name, values, denoise))
    return guards


def _guidance(
    values: dict[str, Any], denoise: Any, sources: Sources, handles: list[Any], device: torch.device | str
) -> AntiMemorizationGuidance:
    """At work in the UNet until its handle is removed."""
    unet, scheduler, scale = denoise.guided
    if unet is None:
        raise _not_for(AntiMemorizationGuidance.name, "models with a UNet", denoise.pipeline)
    train = sources.train(AntiMemorizationGuidance.name, values.get("train"))
    clusters = near_clusters(train)
    train = train.subset(np.flatnonzero(clusters == np.arange(len(train))))
    pixels = as_floats(np.asarray(train.images[:]), torch.device(device))
    pipeline = getattr(denoise, "pipeline", None)
    if pipeline is None and {"despecify", "deduplicate"} & set(values):
        raise InputError("--guard amg: despecify and deduplicate are for text-to-image models")
    embed = None
    if pipeline is not None:
        vae = pipeline.vae
        with torch.no_grad():
            parts = [part.to(vae.dtype) for part in torch.split(pixels, 8)]
            pixels = torch.cat([vae.encode(part).latent_dist.mean.float() for part in parts])
        pixels = (pixels - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor
        if train.captions is not None and getattr(pipeline, "text_encoder_2", None) is None:
            embed = _captions_of(pipeline, train.captions)
    numbers = {name: value for name, value in values.items() if name != "train"}
    guard = AntiMemorizationGuidance(pixels, **numbers, embed=embed, clip=pipeline is None, train=train.fingerprint)
    handles.append(guard.attach(unet, scheduler, scale))
    return guard


def _captions_of(pipeline: Any, captions: Sequence[str]) -> Embed:
    def embed(rows: Sequence[int]) -> dict[str, Any]:
        texts = [captions[row] for row in rows]
        return {"encoder_hidden_states": pipeline.encode_prompt(texts, pipeline.unet.device, 1, False)[0]}

    return embed


def _text_guard(name: str, values: dict[str, Any], denoise: Any) -> Any:
    """The guard, at work in the prompts of ``denoise``."""
    pipeline = getattr(denoise, "pipeline", None)
    if pipeline is None:
        raise InputError(f"--guard {name}: is for text-to-image models, with --prompts")
    if name in ("embedding-noise", "prompt-optimization") and getattr(pipeline, "text_encoder_2", None) is not None:
        raise _not_for(name, "pipelines with one text encoder", pipeline)
    if name == "attention" and getattr(pipeline, "unet", None) is None:
        raise _not_for(name, "models with a UNet", pipeline)
    guard: Any
    if name in ("random-tokens", "repeat-words"):
        words = name == "random-tokens"
        guard = random_tokens(pipeline.tokenizer, values.get("count", 4)) if words else RepeatWords()
        denoise.guards.texts.append(guard)
    elif name == "attention":
        guard = denoise.guards.attention = AttentionReweighting(**values)
    else:
        if name == "prompt-optimization" and "target" not in values:
            raise InputError("--guard prompt-optimization: add target=NORM; unrote prompts says what norms there are")
        guard = EmbeddingNoise(**values) if name == "embedding-noise" else PromptOptimization(**values)
        denoise.guards.embeddings.append(guard)
    return guard


def _not_for(name: str, what: str, pipeline: Any) -> InputError:
    others = "copy-filter, random-tokens and repeat-words"
    return InputError(f"--guard {name}: is for {what}, not for a {type(pipeline).__name__}; it takes {others}")


def _copy_filter(spec: Spec, sources: Sources, seed: int, device: str) -> CopyFilter:
    values: dict[str, Any] = spec.values
    if "threshold" in values and "holdout" in values:
        raise InputError("--guard copy-filter: threshold is given and holdout would calibrate it; choose one")
    if "rate" in values and "holdout" not in values:
        raise InputError("--guard copy-filter: rate is of the calibration; add holdout=DATA")
    if "encoder" in values and not {"threshold", "holdout"} & set(values):
        raise InputError("--guard copy-filter: an encoder has no usual threshold; add holdout=DATA or threshold=NUMBER")
    train = sources.train(spec.name, values.get("train"))
    index: TrainingIndex
    if "encoder" in values:
        encoder = load_encoder(values["encoder"], device=device)
        index = FeatureIndex(train, encoder, threshold=values.get("threshold", 1.0), cache=cache_folder() / "features")
    else:
        index = PixelIndex(train, threshold=values.get("threshold", DEFAULT_RATIO))
    if "holdout" in values:
        calibrate(index, sources.opened(values["holdout"]), values.get("rate", 0.01), seed)
    return CopyFilter(index, tries=values.get("tries", 4))
