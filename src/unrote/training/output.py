"""What a finished run leaves: a diffusers pipeline, the ledger, the model card."""

import shutil
from pathlib import Path

from diffusers import DDPMPipeline, UNet2DModel

from unrote import __version__
from unrote.config import Config
from unrote.data.store import ImageStore
from unrote.files import atomic_path, write_json, write_text
from unrote.method.ledger import Ledger
from unrote.models.denoiser import build_schedule
from unrote.training.ema import EMA
from unrote.training.run import Run

RAW_VARIANT = "raw"
"""The diffusers variant under which the weights without averaging are saved beside the averaged ones."""


def write_outputs(
    run: Run, config: Config, images: ImageStore, model: UNet2DModel, ema: EMA | None, ledger: Ledger, steps: int
) -> None:
    """Write ``model/``, ``ledger.csv``, ``README.md`` and, last, ``run.json``, which says that all is there."""
    columns = ledger.columns()
    run.write_ledger(columns, images.names)
    save_pipeline(run.model_folder, config, model, ema)
    visits, skips = int(columns["visits"].sum()), int(columns["skips"].sum())
    write_text(run.path / "README.md", model_card(config, images, visits, skips))
    summary = {"samples_seen": visits, "steps": steps, "skipped": skips, "augmented": int(columns["augmented"].sum())}
    write_json(run.path / "run.json", {"unrote": __version__, **summary, "moved": int(columns["moves"].sum())})


def save_pipeline(folder: Path, config: Config, model: UNet2DModel, ema: EMA | None) -> None:
    """Write a pipeline that ``DDPMPipeline.from_pretrained`` loads without this package.

    Its weights are the averaged ones; ``variant="raw"`` loads those without averaging, the only ones without EMA.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_path(folder) as temporary:
        pipeline = DDPMPipeline(model, build_schedule(config.model))
        if ema is None:
            pipeline.save_pretrained(temporary)
            return
        model.save_pretrained(temporary / "unet", variant=RAW_VARIANT)
        with ema.applied():
            pipeline.save_pretrained(temporary)


def model_card(config: Config, images: ImageStore, visits: int, skips: int) -> str:
    """A model card in the Hub's format."""
    shards = f"{config.num_shards} shards" if config.num_shards > 1 else "one shard"
    _, height, width, _ = images.images.shape
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [unrote, diffusion, memorization]
---

# A denoising diffusion model trained with `{config.method}`

Trained by unrote {__version__} on {len(images):,} images of {width}x{height} pixels
from `{images.source}` (fingerprint `{images.fingerprint[:16]}`), in {shards}; {visits:,} samples seen, of which
{skips:,} ({skips / max(visits, 1):.1%}) were skipped because the model already knew them unusually well.

```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("model")
```

`model/` holds {
        "the averaged (EMA) weights; `variant='raw'` loads those without averaging"
        if config.training.use_ema
        else "the weights without averaging"
    }. `config.yaml` has every setting, `ledger.csv` what the method saw of each
training image.

## Limits

How much of the training set this model reproduces is not known until it is audited:
`unrote sample` and then `unrote audit` measure it. IET-AGC+ lowers memorization; it is no differential-privacy
guarantee.
"""
