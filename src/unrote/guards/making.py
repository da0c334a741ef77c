"""From ``--guard`` to the guards around a sampling."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unrote.data import ImageStore, open_images
from unrote.data.build import cache_folder
from unrote.encoders import load_encoder
from unrote.errors import InputError
from unrote.guards.copy_filter import CopyFilter
from unrote.guards.index import DEFAULT_RATIO, FeatureIndex, PixelIndex, TrainingIndex, calibrate
from unrote.guards.spec import Spec, parse_guard
from unrote.training.images import training_images
from unrote.training.run import Run


@dataclass
class Guards:
    """The guards around one sampling.

    Attributes:
        copy_filter: what checks finished images; None without one.
        others: what is at work while images are denoised.
    """

    copy_filter: CopyFilter | None = None
    others: list[Any] = field(default_factory=list)

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
    """

    run: Run | None
    shape: tuple[int, int, int]

    def train(self, guard: str, asked: Any) -> ImageStore:
        """The training images that ``asked`` names, or those of the run.

        Raises:
            InputError: there are none to take, or they have another size than what is generated.
        """
        if asked is None and self.run is None:
            raise InputError(f"--guard {guard}: needs the training images; add train=DATA")
        images = self.opened(asked) if asked is not None else self._of(self.run)
        if images.images.shape[1:] != self.shape:
            there, here = ("x".join(map(str, shape)) for shape in (images.images.shape[1:], self.shape))
            raise InputError(f"--guard {guard}: training images are {there}, what is generated is {here}")
        return images

    def opened(self, data: Any) -> ImageStore:
        """The images of ``data`` at the size of what is generated."""
        if (run := Run(Path(data))).finished:
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
    texts: Sequence[str], denoise: Any, run: Run | None, *, seed: int = 0, device: torch.device | str = "cpu"
) -> Guards:
    """The guards that ``texts`` name, at work in ``denoise``.

    Args:
        texts: ``NAME[:key=value,…]`` each; see docs/guards.md.
        denoise: :class:`unrote.sampling.Denoiser` or :class:`unrote.text.generation.PromptDenoiser`.
        run: the run that the model belongs to; None for another pipeline.
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
    sources, guards = Sources(run, denoise.shape), Guards()
    for spec in specs:
        if spec.name == CopyFilter.name:
            guards.copy_filter = _copy_filter(spec, sources, seed, str(device))
    return guards


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
