"""What a study is: regimes x methods x seeds, read from one YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from unrote.config import Config, load_config, nearest, read_yaml, validated
from unrote.config.base import Section
from unrote.errors import InputError
from unrote.guards.spec import parse_guard

SAME_FOR_ALL = ("seed", "method", "preset", "data.", "model.", "training.epochs", "training.batch_size")
"""Settings, or sections of them, that no method may choose: the images, the model and the budget of a regime."""
PIXEL_GUARDS = ("copy-filter", "amg")
METHODS_OWN = ("data.random_flip", "model.dropout")
"""Of these the mitigations, which change neither the images that are there nor the number of parameters."""
STUDYS_OWN = ("seed", "data.", "training.epochs", "training.snapshots")
"""What the study itself sets; a regime says it in other words."""

Settings = Annotated[dict[str, Any], Field(default_factory=dict)]


class RepeatsPlan(Section):
    """Training images that stand in the set many times."""

    share: Annotated[float, Field(gt=0, le=1)]
    """Share of the distinct training images that are repeated."""
    times: Annotated[int, Field(ge=2)]
    """How often each of them is there."""


class ImagesPlan(Section):
    """Which images are trained on, and which are kept away from training."""

    source: str
    """What ``unrote train --data`` takes: image folder, .npz, or NAME[:SPLIT] of a named set."""
    held_out: str | None = None
    """Where control and reference come from; none takes other images of ``source``."""
    resolution: PositiveInt
    """Height and width in pixels."""
    channels: Literal[1, 3] = 3
    """1 for grey images, 3 for RGB."""
    train: PositiveInt
    """N, how many distinct images a run is trained on; its seed chooses which."""
    reference: PositiveInt
    """Held-out images that the Fréchet distance is taken to; the same for all seeds."""
    labelled: str | None = None
    """Whose labelled images a small classifier learns from, in whose features quality is measured; none: ``source``."""
    repeats: RepeatsPlan | None = None
    """Some of the training images stand in the set many times; none repeats none."""


class SamplingPlan(Section):
    """How each snapshot is sampled."""

    num: Annotated[int, Field(ge=2)] = 512
    """Images per snapshot."""
    sampler: Literal["ddim", "ddpm", "dpm-solver++"] = "ddim"
    """As of ``unrote sample``."""
    steps: PositiveInt = 25
    """Denoising steps."""
    batch_size: PositiveInt = 128
    """Images denoised at once."""


class Regime(Section):
    """The same images, model and budget for every method."""

    about: str = ""
    """In words."""
    images: ImagesPlan
    """What is trained on."""
    samples_seen: PositiveInt
    """The budget of every run."""
    snapshots: PositiveInt = 5
    """Points of a curve: models kept evenly along the budget."""
    sampling: SamplingPlan = SamplingPlan()
    """How they are sampled."""
    preset: str = "tiny"
    """Where settings that are not given come from."""
    settings: Settings
    """Dotted settings of all methods."""


class MethodPlan(Section):
    """A mitigation, or none."""

    method: str = "standard"
    """As of ``unrote train``: standard, agc, iet, ..."""
    settings: Settings
    """Dotted settings on top of the regime's."""
    deduplicate: bool = False
    """Train on one image of each cluster of near-duplicates, as ``unrote scan`` finds them; the budget is the same."""
    guards: tuple[str, ...] = ()
    """At work while sampling, as of ``unrote sample --guard``; methods that differ in this alone train once."""
    regimes: tuple[str, ...] | None = None
    """The regimes it takes part in; none is all."""
    about: str = ""
    """In words."""


class Study(Section):
    """A study file."""

    name: str
    """What it is called."""
    about: str = ""
    """In words."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """Each chooses the training images and everything random in training."""
    baseline: str = "standard"
    """The method that the others are compared with: ordinary training, with early stopping."""
    regimes: Annotated[dict[str, Regime], Field(min_length=1)]
    """By name."""
    methods: Annotated[dict[str, MethodPlan], Field(min_length=1)]
    """By name."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Study":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: one is there twice")
        if self.baseline not in self.methods:
            raise ValueError(f"baseline: there is no method {self.baseline!r}{nearest(self.baseline, self.methods)}")
        for name in [*self.regimes, *self.methods]:
            if not name or any(not (c.isalnum() or c in "+-._ =") for c in name):
                raise ValueError(f"{name!r} is no name: use letters, digits and + - . _ = only")
        for name, regime in self.regimes.items():
            _refuse(f"regimes.{name}.settings", regime.settings, STUDYS_OWN, (), "is set by the study")
        for name, method in self.methods.items():
            where = f"methods.{name}"
            why = "is the same for every method of a regime: equal images, equal model, equal samples seen"
            _refuse(f"{where}.settings", method.settings, (*SAME_FOR_ALL, *STUDYS_OWN), METHODS_OWN, why)
            _check_guards(f"{where}.guards", method.guards)
            for regime_name in method.regimes or ():
                if regime_name not in self.regimes:
                    raise ValueError(f"{where}.regimes: there is no regime {regime_name!r}")
        return self

    def methods_of(self, regime: str) -> list[str]:
        """The methods that take part in ``regime``."""
        return [name for name, plan in self.methods.items() if plan.regimes is None or regime in plan.regimes]

    def config(self, regime: str, method: str, seed: int, count: int) -> Config:
        """The training configuration of one run on ``count`` images, repeated ones counted as often as they are there.

        Raises:
            InputError: the settings are not settings of training.
        """
        plan, chosen = self.regimes[regime], self.methods[method]
        own = {
            "data.source": plan.images.source,
            "data.resolution": plan.images.resolution,
            "data.channels": plan.images.channels,
            # The product is rounded to whole samples again.
            "training.epochs": plan.samples_seen / count,
            "training.snapshots": plan.snapshots,
            "seed": seed,
        }
        settings = plan.settings | chosen.settings | own
        try:
            return load_config(method=chosen.method, preset=plan.preset, overrides=settings)
        except InputError as error:
            raise InputError(f"regime {regime}, method {method}: {error}") from None


def load_study(path: Path) -> Study:
    """The study in a YAML file, every run's configuration validated.

    Raises:
        InputError: naming the file, the key and what is allowed.
    """
    study = validated(Study, read_yaml(path), str(path))
    for regime in study.regimes:
        for method in study.methods_of(regime):
            try:
                study.config(regime, method, study.seeds[0], study.regimes[regime].images.train)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
    return study


def _refuse(
    where: str, settings: Mapping[str, Any], refused: tuple[str, ...], allowed: tuple[str, ...], why: str
) -> None:
    for key in settings:
        if key in allowed:
            continue
        if any(key == one or (one.endswith(".") and key.startswith(one)) for one in refused):
            raise ValueError(f"{where}: {key} {why}")


def _check_guards(where: str, guards: tuple[str, ...]) -> None:
    """Raise ValueError unless they are guards of models without text, and compare with what was trained on."""
    for text in guards:
        try:
            spec = parse_guard(text)
        except InputError as error:
            raise ValueError(f"{where}: {error}") from None
        if spec.name not in PIXEL_GUARDS:
            raise ValueError(f"{where}: {spec.name} is for text-to-image models; there are {', '.join(PIXEL_GUARDS)}")
        if "train" in spec.values:
            raise ValueError(f"{where}: {spec.name} compares with the images that the method is trained on; no train=")
