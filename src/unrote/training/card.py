"""The model card of a finished run, in the Hub's format."""

import json

from unrote import __version__
from unrote.card_section import section
from unrote.config import Config, differing
from unrote.data.store import ImageStore

NOT_AUDITED = """## Memorization audit

How much of the training set this model reproduces is not known until it is audited:
`unrote sample` and then `unrote audit` of the run measure it and write the result here; `--baseline` sets it beside
a model trained with `--method standard`."""


def model_card(config: Config, images: ImageStore, visits: int, skips: int) -> str:
    """What was trained on what, how to load it, and what is not known of it."""
    shards = f"{config.num_shards} shards" if config.num_shards > 1 else "one shard"
    _, height, width, _ = images.images.shape
    return f"""---
{_head(config)}
---

# {_title(config)}

Trained by unrote {__version__} on {len(images):,} images of {width}x{height} pixels
from `{images.source}` (fingerprint `{images.fingerprint[:16]}`), in {shards}; {visits:,} samples seen, of which
{skips:,} ({skips / max(visits, 1):.1%}) were skipped because the model already knew them unusually well.

```python
{_usage(config)}
```

{_weights(config)} `config.yaml` has every setting, `ledger.csv` what the method saw of each
training image.

## Settings

Those that differ from the package's defaults:

```yaml
{_settings(config)}
```

{section(NOT_AUDITED)}

## Limits

IET-AGC+ lowers memorization; it is no differential-privacy guarantee.{_inherited(config)}
"""


def _settings(config: Config) -> str:
    return "\n".join(f"{key}: {json.dumps(value)}" for key, (_, value) in differing(Config(), config).items())


def _head(config: Config) -> str:
    base = config.model.pretrained
    kind = "unconditional-image-generation" if base is None else "text-to-image"
    tags = "unrote, diffusion, memorization" + (", lora" if config.model.train == "lora" else "")
    head = f"library_name: diffusers\npipeline_tag: {kind}\ntags: [{tags}]"
    return head if base is None else f"{head}\nbase_model: {base}"


def _title(config: Config) -> str:
    if config.model.pretrained is None:
        return f"A denoising diffusion model trained with `{config.method}`"
    what = f"Adapters of rank {config.model.lora.rank} for" if config.model.train == "lora" else "A fine-tuned"
    return f"{what} `{config.model.pretrained}`, trained with `{config.method}`"


def _usage(config: Config) -> str:
    if config.model.pretrained is None:
        return 'from diffusers import DDPMPipeline\n\npipeline = DDPMPipeline.from_pretrained("model")'
    if config.model.train == "full":
        return 'from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained("model")'
    return (
        f'from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained("'
        f'{config.model.pretrained}")\npipeline.load_lora_weights("model")'
    )


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
