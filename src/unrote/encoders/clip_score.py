"""CLIP score: how well images fit their captions (Hessel et al. 2021, "CLIPScore")."""

from collections.abc import Sequence

import numpy as np
import torch

from unrote.encoders import load_encoder
from unrote.encoders.vision_models import DEFAULTS, VisionModel, model_folder, readable
from unrote.errors import InputError
from unrote.neighbours.streaming import Rows

BATCH = 64


@torch.no_grad()
def clip_scores(
    model: str, images: Rows, captions: Sequence[str], *, device: str = "cpu", batch: int = BATCH
) -> np.ndarray:
    """100 · max(cos(image, caption), 0) for each pair, with CLIP's projected embeddings.

    The scale is torchmetrics'; Hessel et al. multiply by 2.5 instead of 100 and put "A photo depicts" before a caption,
    which is not done here. Longer captions are cut to what the model reads (77 tokens with their marks).
    Scores of different models cannot be compared.

    Args:
        model: folder or Hub id of a CLIP model with tokenizer; empty for ViT-B/32, the paper's.
        images: uint8 [G, H, W, C], C = 1 or 3.
        captions: one text per image.
        device: where the model runs.
        batch: pairs at a time; no influence on the scores but for float32 rounding.

    Returns:
        float64 [G], 0 to 100.

    Raises:
        InputError: another number of captions than images, or no CLIP model with tokenizer there.
    """
    if len(captions) != len(images):
        raise InputError(
            f"a CLIP score needs one caption per image: {len(captions):,} captions, {len(images):,} images"
        )
    where = model or DEFAULTS["clip"]
    encoder = load_encoder(f"clip={where}", device=device)
    assert isinstance(encoder, VisionModel)
    if not hasattr(encoder.model, "get_text_features"):
        raise InputError(f"clip={where} holds a {type(encoder.model).__name__} without a text part")
    from transformers import AutoTokenizer

    folder = model_folder("clip", where)
    with readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    length = encoder.model.config.text_config.max_position_embeddings
    scores = np.zeros(len(images))
    for start in range(0, len(images), batch):
        texts = [str(caption) for caption in captions[start : start + batch]]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(device)
        output = encoder.model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        text = getattr(output, "pooler_output", output).float().cpu().numpy()  # a tensor before transformers 5
        scores[start : start + batch] = 100 * np.maximum(_cosines(encoder(images[start : start + batch]), text), 0)
    return scores


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Row by row. float64 [n]."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: np.ndarray = (first * second).sum(1) / norms
    return cosines
