"""What a text encoder reads of a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def padded_tokens(tokenizer: Any, encoder: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and whether they are text, int64 [B, L] both: cut off or padded to what the encoder reads."""
    length = min(tokenizer.model_max_length, getattr(encoder.config, "max_position_embeddings", 1 << 30))
    found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    return found.input_ids.astype(np.int64), found.attention_mask.astype(np.int64)


def reads_mask(encoder: Any) -> bool:
    """Whether diffusers gives the encoder the mask of its text too."""
    return bool(getattr(encoder.config, "use_attention_mask", False))
