"""What a text encoder reads of a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def padded_tokens(
    tokenizer: Any, encoder: Any, texts: Sequence[str], unbounded: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and whether they are text, int64 [B, L] both: cut off or padded to what the encoder reads.

    Args:
        tokenizer: of the encoder.
        encoder: a text encoder.
        texts: B texts.
        unbounded: how much an encoder reads that could read texts of any length, such as T5; else by tokenizer.
    """
    positions = getattr(encoder.config, "max_position_embeddings", unbounded)
    # A tokenizer may name a length, which pipelines do not go by for a T5.
    named = positions is None or positions is not unbounded
    length = min(size for size in (positions, tokenizer.model_max_length if named else None) if size is not None)
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return found.input_ids.astype(np.int64), found.attention_mask.astype(np.int64)


def reads_mask(encoder: Any) -> bool:
    """Whether diffusers gives the encoder the mask of its text too."""
    return bool(getattr(encoder.config, "use_attention_mask", False))
