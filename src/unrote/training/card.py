"""The model card of a finished run, in the Hub's format."""

import json
from collections.abc import Mapping
from pathlib import Path

from unrote import __version__
from unrote.card_section import section
from unrote.config import Config, differing
from unrote.data.named import split_name
from unrote.data.store import ImageStore
from unrote.models.known import HUB_ID

PATHS = ("data.include", "model.pretrained")
"""Settings that a card does not list: paths of this machine, or said elsewhere in it."""
DATA = ("data.source", "monitor.holdout")
"""Settings that a card lists where they are no paths."""
BASE = "BASE_MODEL"
"""Stands in the card's example for a base model that is a path."""
_BESIDE = " `config.yaml` has every setting, `ledger.csv` what the method saw of each\ntraining image."
_CALLS = ("from_pretrained", "load_lora_weights")

NOT_AUDITED = """## Memorization audit

How much of the training set this model reproduces is not known until it is audited:
`unrote sample` and then `unrote audit` of the run measure it and write the result here; `--baseline` sets it beside
a model trained with `--method standard`."""


def model_card(
    config: Config,
    images: ImageStore,
    visits: int,
    skips: int,
    privacy: Mapping[str, float],
    earlier: int | None = None,
) -> str:
    """What was trained on what, how to load it, and what is not known of it; no path of this machine.

    Args:
        config: of the run.
        images: the training images.
        visits: samples seen.
        skips: those of them that were skipped.
        privacy: as :func:`unrote.training.privacy.privacy_spent` gives it.
        earlier: how many of them the weights saw, if the monitor kept earlier ones than the last.
    """
    shards = f"{config.num_shards} shards" if config.num_shards > 1 else "one shard"
    _, height, width, _ = images.images.shape
    named = public_data(images.source)
    source = "" if named is None else f" from `{named}`"
    seen = f"{visits:,} samples seen"
    if config.gate.enabled:
        share = f"{skips:,} ({skips / max(visits, 1):.1%})"
        seen += f", of which\n{share} were skipped because the model already knew them unusually well"
    if earlier is not None:
        seen += f".\nThe weights are those after {earlier:,} samples, which the monitor found to be best"
    return f"""---
{_head(config)}
---

# {_title(config)}

Trained by unrote {__version__} on {len(images):,} images of {width}x{height} pixels{source}
(fingerprint `{images.fingerprint[:16]}`), in {shards}; {seen}.

```python
{_usage(config)}
```

{_weights(config)}{_BESIDE}

## Settings

Those that differ from the package's defaults, without files and folders:

```yaml
{_settings(config)}
```

{section(NOT_AUDITED)}

## Limits

{_limits(config, privacy)}{_inherited(config)}
"""


def of_repository(card: str, repository: str) -> str:
    """The card as it stands on the Hub: of ``owner/name``, where only the content of ``model/`` is."""
    for call in _CALLS:
        card = card.replace(f'{call}("model")', f'{call}("{repository}")')
    return card.replace(_BESIDE, "").replace("`model/raw/`", "`raw/`").replace("`model/` holds", "The repository holds")


def public_data(source: str) -> str | None:
    """``source`` if it names a set of this package or, after ``hf:``, one of the Hub; None if it is a path."""
    return source if split_name(source) is not None or _on_hub(source, "hf:") else None


def _on_hub(source: str, prefix: str = "") -> bool:
    name = source.removeprefix(prefix).partition(":")[0]
    return source.startswith(prefix) and bool(HUB_ID.fullmatch(name)) and not Path(name).expanduser().exists()


def _settings(config: Config) -> str:
    changed = {key: value for key, (_, value) in differing(Config(), config).items() if key not in PATHS}
    shown = {key: value for key, value in changed.items() if key not in DATA or public_data(value) is not None}
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in shown.items())


def _base(config: Config) -> str | None:
    """The base model's name on the Hub; None if there is none, or it is a path."""
    name = config.model.pretrained
    return name if name is not None and _on_hub(name) else None


def _head(config: Config) -> str:
    kind = "unconditional-image-generation" if config.model.pretrained is None else "text-to-image"
    tags = "unrote, diffusion, memorization" + (", lora" if config.model.train == "lora" else "")
    head, base = f"library_name: diffusers\npipeline_tag: {kind}\ntags: [{tags}]", _base(config)
    return head if base is None else f"{head}\nbase_model: {base}"


def _title(config: Config) -> str:
    if config.model.pretrained is None:
        return f"A denoising diffusion model trained with `{config.method}`"
    base = _base(config)
    if config.model.train == "lora":
        what = (
            f"Adapters of rank {config.model.lora.rank} for {'a text-to-image model' if base is None else f'`{base}`'}"
        )
    else:
        what = "A fine-tuned " + ("text-to-image model" if base is None else f"`{base}`")
    return f"{what}, trained with `{config.method}`"


def _usage(config: Config) -> str:
    if config.model.pretrained is None:
        return 'from diffusers import DDPMPipeline\n\npipeline = DDPMPipeline.from_pretrained("model")'
    if config.model.train == "full":
        return 'from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained("model")'
    base = _base(config)
    note = "  # the model that the adapters are for" if base is None else ""
    return (
        "from diffusers import DiffusionPipeline\n\n"
        f'pipeline = DiffusionPipeline.from_pretrained("{base or BASE}"){note}\npipeline.load_lora_weights("model")'
    )


def _limits(config: Config, privacy: Mapping[str, float]) -> str:
    if privacy:
        spent = f"ε = {privacy['epsilon']:.3g} at δ = {privacy['delta']:g}"
        return (
            f"Trained by DP-SGD: {spent}, by an accountant for batches that take each image\nindependently. Batches "
            "here were shuffled, and the noise follows from the seed: a baseline for studies, no guarantee to rely on."
        )
    if config.method == "standard":
        return (
            "There is no differential-privacy guarantee: an audit counts the copies that it finds, and proves no more."
        )
    return f"`{config.method}` is made to lower memorization; it is no differential-privacy guarantee."


def _weights(config: Config) -> str:
    if not config.training.use_ema:
        return "`model/` holds the weights without averaging."
    raw = "`model/raw/`" if config.model.train == "lora" else "`variant='raw'`"
    verb = "has" if config.model.train == "lora" else "loads"
    return f"`model/` holds the averaged (EMA) weights; {raw} {verb} those without averaging."


def _inherited(config: Config) -> str:
    if config.model.pretrained is None:
        return ""
    return "\nWhat the base model memorized before, and its licence, go on to apply."
