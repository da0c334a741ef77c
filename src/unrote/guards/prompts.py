"""Guards of the text: random tokens, repeated words, noise on embeddings (Somepalli et al. 2023, at inference)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from torch import Tensor

from unrote.errors import InputError
from unrote.seeding import derive_seed, generator
from unrote.text.mitigations import add_tokens, noisy_embeddings, repeat_words, vocabulary


class TextGuard(Protocol):
    """Changes the prompts themselves."""

    def text(self, prompt: str, seed: int) -> str:
        """The prompt to use instead; a function of the two."""

    def settings(self) -> dict[str, Any]:
        """What the images depend on, JSON-able."""


class EmbeddingGuard(Protocol):
    """Changes the embedding of a prompt."""

    def embedding(self, pipeline: Any, embedding: Tensor, empty: Tensor, noise: Tensor, seed: int) -> Tensor:
        """The embedding to use instead, [L, D].

        Args:
            pipeline: that will sample.
            embedding: of the prompt, [L, D].
            empty: of the empty text, [L, D].
            noise: that the pipeline will start this image from, [C, h, w].
            seed: of the guard's own randomness for this image.
        """

    def settings(self) -> dict[str, Any]:
        """What the images depend on, JSON-able."""


@dataclass(frozen=True)
class RandomTokens:
    """``count`` random words, each at a random place.

    Attributes:
        words: to draw from: :func:`unrote.text.mitigations.vocabulary`.
        count: how many; the paper's code adds 2 to 4.
    """

    words: Sequence[str]
    count: int = 4

    def text(self, prompt: str, seed: int) -> str:
        """See :func:`unrote.text.mitigations.add_tokens`."""
        return add_tokens(prompt, self.words, self.count, Random(derive_seed(seed, "random-tokens")))

    def settings(self) -> dict[str, Any]:
        """The count."""
        return {"guard": "random-tokens", "count": self.count}


@dataclass(frozen=True)
class RepeatWords:
    """Two of the prompt's words occur once more, at random places."""

    def text(self, prompt: str, seed: int) -> str:
        """See :func:`unrote.text.mitigations.repeat_words`."""
        return repeat_words(prompt, 1.0, Random(derive_seed(seed, "repeat-words")))

    def settings(self) -> dict[str, Any]:
        """Nothing to set."""
        return {"guard": "repeat-words"}


@dataclass(frozen=True)
class EmbeddingNoise:
    """Gaussian noise of deviation ``std`` on the text embedding; the paper's is 0.1."""

    std: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise InputError(f"--guard embedding-noise: std must not be negative, and finite, not {self.std:g}")

    def embedding(self, pipeline: Any, embedding: Tensor, empty: Tensor, noise: Tensor, seed: int) -> Tensor:
        """See :func:`unrote.text.mitigations.noisy_embeddings`."""
        return noisy_embeddings(embedding, self.std, generator(seed, "embedding-noise"))

    def settings(self) -> dict[str, Any]:
        """The deviation."""
        return {"guard": "embedding-noise", "std": self.std}


def random_tokens(tokenizer: Any, count: int) -> RandomTokens:
    """The guard with a tokenizer's words. Raises InputError for a count below 1."""
    if count < 1:
        raise InputError(f"--guard random-tokens: count must be at least 1, not {count}")
    return RandomTokens(vocabulary(tokenizer), count)
