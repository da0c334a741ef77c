"""What a fine-tuned model makes of captions it was and was not trained on, measured by the product's own audit."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Scale
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from unrote.auditing import audit
from unrote.auditing.intervals import fraction
from unrote.auditing.memorization import HEADLINE
from unrote.data import ImageStore, in_memory_store
from unrote.encoders.base import Encoder
from unrote.sampling import make_scheduler
from unrote.text.generation import LORA_WEIGHTS, PromptDenoiser
from unrote.text.prompts import Prompt

BATCH = 64
SPACE = "random-conv"


def with_weights(pipeline: Any, base: Path, folder: Path | None) -> Any:
    """``pipeline``, which ``base`` holds, with the denoiser or the adapters in ``folder``; None takes it as it is."""
    lora = folder is not None and (folder / LORA_WEIGHTS).exists()
    unet = UNet2DConditionModel.from_pretrained(
        base if lora or folder is None else folder, subfolder="unet", low_cpu_mem_usage=False
    )
    if lora:
        unet.load_lora_adapter(folder, weight_name=LORA_WEIGHTS, prefix="unet")
    tuned = StableDiffusionPipeline(**pipeline.components | {"unet": unet.eval()}, requires_safety_checker=False)
    tuned.encode_prompt = pipeline.encode_prompt  # which has read the captions for an earlier snapshot
    return tuned


@torch.inference_mode()
def make_images(pipeline: Any, images: ImageStore, scale: Scale, seed: int) -> np.ndarray:
    """One image for each first caption of ``images``, uint8 [N, H, W, 3]."""
    pipeline.scheduler = make_scheduler(pipeline.scheduler, scale.sampler, scale.steps, clip_sample=False)
    assert images.captions is not None
    denoise = PromptDenoiser(
        pipeline,
        [Prompt(caption) for caption in images.captions],
        seed=seed,
        steps=scale.steps,
        guidance_scale=scale.guidance_scale,
        size=images.images.shape[1:3],
    )
    parts = [denoise(range(start, min(start + BATCH, len(images)))) for start in range(0, len(images), BATCH)]
    return np.concatenate(parts)


def measure(
    copies: np.ndarray,
    fresh: np.ndarray,
    asked: ImageStore,
    unseen: ImageStore,
    train: ImageStore,
    holdout: ImageStore,
    sscd: Encoder | None,
    looked_at: int,
    cache: Path,
) -> dict[str, dict[str, Any]]:
    """``memorization`` of ``copies``, ``quality`` of ``fresh`` in the form of a study's points, and ``prompts``.

    Args:
        copies: images made from the captions of ``asked``, a part of the training set.
        fresh: images made from the captions of ``unseen``, a part of the held-out set.
        asked: training images whose captions were used.
        unseen: held-out images whose captions were used.
        train: the training set.
        holdout: the held-out set.
        sscd: the copy detector; None leaves it out.
        looked_at: how many of the first of ``copies`` it is given.
        cache: folder for its features of the real images.
    """
    made = in_memory_store(copies, source="made from training captions")
    seen = audit(made, train, holdout, origins=list(asked.names), cache=cache)
    other = audit(in_memory_store(fresh, source="made from held-out captions"), train, holdout, cache=cache)
    near = seen.pairs["orbit_ratio_distinct"] < HEADLINE["squared-l2"]
    repeated = np.array([f"{name.removesuffix('.png')}-again1.png" in set(train.names) for name in asked.names])
    groups = {"repeated": fraction(int(near[repeated].sum()), int(repeated.sum()))} if repeated.any() else {}
    groups["single"] = fraction(int(near[~repeated].sum()), int((~repeated).sum()))
    known = seen.summary["memorization"]["orbit"]["squared-l2"]["calibrated"]
    orbit = fraction(int(near.sum()), len(near)) | {"distinct": seen.summary["extracted"]["distinct"]}
    return {
        "memorization": {
            "orbit": orbit | groups,
            "calibrated": None if known is None else {"threshold": known["threshold"], **known["below"]},
            "train_share": seen.summary["train_share"]["orbit"],
            **({} if sscd is None else {"sscd": copy_detection(copies[:looked_at], train, holdout, sscd, cache)}),
        },
        "quality": {"primary": SPACE, SPACE: {"frechet_distance": frechet(other.summary)}},
        "prompts": {
            "own_image_nearest": seen.summary["prompted"]["nearest"]["orbit"]["fraction"],
            "own_image_copied": seen.summary["prompted"]["copied"]["fraction"],
            "training_captions_distance": frechet(seen.summary)["value"],
            "copied_from_held_out_captions": float(
                (other.pairs["orbit_ratio_distinct"] < HEADLINE["squared-l2"]).mean()
            ),
            **agreement(fresh, unseen),
        },
    }


def frechet(summary: dict[str, Any]) -> dict[str, Any]:
    """Fréchet distance to the held-out art in the features of random convolutions, with its interval."""
    found: dict[str, Any] = summary["spaces"][SPACE]["quality"]["generated"]["frechet_distance"]
    return found


def copy_detection(
    copies: np.ndarray, train: ImageStore, holdout: ImageStore, sscd: Encoder, cache: Path
) -> dict[str, Any]:
    """95th percentile of the similarity, and the share above the threshold that 1 % of the held-out art exceeds."""
    made = in_memory_store(copies, source="made from training captions")
    found = audit(made, train, holdout, encoders=[sscd], cache=cache).summary
    similarity = found["spaces"][sscd.key]["similarity"]
    known = similarity["calibrated"]
    return {
        "p95": similarity["generated"]["quantiles"]["0.95"],
        "calibrated": None if known is None else {"threshold": known["threshold"], **known["above"]},
    }


def agreement(made: np.ndarray, meant: ImageStore) -> dict[str, float]:
    """How often a made image is more like the real art of its own caption than like that of other captions.

    Similarity is the cosine of pixels, blurred to 8×8 and less the mean image of ``meant``: coarse layout and colours,
    which no part of the model was trained with. ``prompt_rank`` is the mean share of other captions' art that is less
    similar, 0.5 by chance; ``prompt_first`` is how often the own one is most similar, 1 / number by chance.
    """
    first, second = (_coarse(images) for images in (made, np.asarray(meant.images)))
    middle = second.mean(0)
    similar = _unit(first - middle) @ _unit(second - middle).T
    own = np.diag(similar)[:, None]
    return {
        "prompt_rank": float((similar < own).sum(1).mean() / (len(meant) - 1)),
        "prompt_first": float((similar.argmax(1) == np.arange(len(meant))).mean()),
    }


def _coarse(images: np.ndarray) -> np.ndarray:
    count, height, width, channels = images.shape
    blocks = images.reshape(count, 8, height // 8, 8, width // 8, channels).astype(np.float64)
    return blocks.mean((2, 4)).reshape(count, -1)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
