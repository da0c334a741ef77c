"""Text-side mitigations: what is done to captions and their embeddings against memorization.

Somepalli et al. 2023 ("Understanding and Mitigating Copying in Diffusion Models", arXiv 2305.20086) and Wen et al. 2024
("Detecting, Explaining, and Mitigating Memorization in Diffusion Models", arXiv 2407.21720). Words are what spaces
separate. An empty caption is the unconditional prompt and stays empty.
"""

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from unrote.config import TextConfig
from unrote.errors import InputError

REPLACEMENT_LENGTH = 4
"""Random words that stand for a replaced caption, as many as in the paper's code."""
REPEATS = 2
"""Words of a caption that are repeated, as many as in the paper's code."""


def replace_caption(caption: str, words: Sequence[str], chance: float, random: Random) -> str:
    """Random caption replacement: with ``chance``, four random ``words`` in place of the caption."""
    if not caption or random.random() >= chance:
        return caption
    return " ".join(random.choice(words) for _ in range(REPLACEMENT_LENGTH))


def replace_tokens(caption: str, words: Sequence[str], chance: float, random: Random) -> str:
    """Random token replacement: each word becomes a random one of ``words`` with ``chance``."""
    return " ".join(random.choice(words) if random.random() < chance else word for word in caption.split())


def add_tokens(caption: str, words: Sequence[str], count: int, random: Random) -> str:
    """Random token addition: ``count`` random ``words``, each at a random place."""
    return _insert(caption, [random.choice(words) for _ in range(count)], random) if caption else caption


def repeat_words(caption: str, chance: float, random: Random) -> str:
    """Caption word repeat: with ``chance``, two words of the caption occur once more, each at a random place."""
    own = caption.split()
    if not own or random.random() >= chance:
        return caption
    return _insert(caption, [random.choice(own) for _ in range(REPEATS)], random)


def _insert(caption: str, words: Sequence[str], random: Random) -> str:
    """Each of ``words`` at a place of its own choice, both ends included."""
    result = caption.split()
    for word in words:
        result.insert(random.randint(0, len(result)), word)
    return " ".join(result)


def noisy_embeddings(embeddings: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation ``std`` (the paper's is 0.1) on text embeddings of any shape and type."""
    noise = torch.randn(embeddings.shape, generator=generator, device=generator.device)
    return embeddings + std * noise.to(embeddings.device, embeddings.dtype)


def prediction_norm(conditional: Tensor, unconditional: Tensor) -> Tensor:
    """How strongly the text steers each prediction: ‖ε(x_t, text) − ε(x_t, empty)‖₂ (Wen et al. 2024).

    In training, samples where it is not below a threshold are left out of the batch, at the noise level at which they
    are trained. The norm grows with the number of elements: a threshold belongs to one latent size.

    Args:
        conditional: predictions given the text, [B, …].
        unconditional: predictions for the same x_t and t given the empty text, [B, …].

    Returns:
        float32 [B].
    """
    norms: Tensor = (conditional.float() - unconditional.float()).flatten(1).norm(dim=1)
    return norms


def vocabulary(tokenizer: Any) -> list[str]:
    """The tokens of a tokenizer that are words by themselves: each is read as exactly that one token again.

    Pieces of words, special tokens and broken characters are left out, so that a caption with n random words in it is n
    tokens longer.

    Raises:
        InputError: there is none.
    """
    special = set(tokenizer.all_special_ids)
    ids = [token for token in range(len(tokenizer)) if token not in special]
    words = [word.strip() for word in tokenizer.batch_decode([[token] for token in ids])]
    read = tokenizer(words, add_special_tokens=False).input_ids
    whole = [word for token, word, again in zip(ids, words, read, strict=True) if again == [token] and word.split()]
    if not whole:
        raise InputError("text: no token of the tokenizer is a word by itself, so there are no random words to draw")
    return whole


class TextPolicy:
    """Which text each sample of a batch is trained with.

    In this order: one of the image's captions, or with ``config.dropout`` the empty text for classifier-free guidance,
    which nothing else changes; then caption replacement, token replacement, token addition, word repeat.

    Args:
        config: what is done.
        tokenizer: whose words are random words; of several tokenizers the first.
        captions: those of each image, the first first; none is the empty text.
    """

    def __init__(self, config: TextConfig, tokenizer: Any, captions: Sequence[Sequence[str]]) -> None:
        self.config = config
        self._captions = [list(texts) or [""] for texts in captions]
        random_words = config.replace_caption or config.replace_tokens or config.add_tokens
        self._words = vocabulary(tokenizer) if random_words else []
        self._draws = config.varies or config.dropout > 0 or config.caption == "random"

    def texts(self) -> list[str]:
        """The empty text and every caption that :meth:`captions_for` can give as it is, sorted."""
        return sorted({"", *(text for texts in self._captions for text in self._choices(texts))})

    def captions_for(self, indices: Tensor, generator: torch.Generator) -> list[str]:
        """The texts of the images ``indices``, int64 [B].

        Takes one number from ``generator``, or none if nothing is random, whatever the texts are: what is drawn from it
        afterwards does not depend on them.
        """
        chosen = [self._choices(self._captions[index]) for index in indices.tolist()]
        if not self._draws:
            return [texts[0] for texts in chosen]
        seed = torch.randint(1 << 62, (1,), generator=generator, device=generator.device)
        random = Random(int(seed))
        return [self._varied(random.choice(texts), random) for texts in chosen]

    def noisy(self, embeddings: Tensor, generator: torch.Generator) -> Tensor:
        """``embeddings`` with noise of ``config.embedding_noise``; as they are, and nothing drawn, if that is 0."""
        std = self.config.embedding_noise
        return noisy_embeddings(embeddings, std, generator) if std else embeddings

    def _choices(self, texts: list[str]) -> list[str]:
        return texts if self.config.caption == "random" else texts[:1]

    def _varied(self, caption: str, random: Random) -> str:
        config = self.config
        if random.random() < config.dropout:
            return ""
        if config.replace_caption:
            caption = replace_caption(caption, self._words, config.replace_caption, random)
        if config.replace_tokens:
            caption = replace_tokens(caption, self._words, config.replace_tokens, random)
        if config.add_tokens:
            caption = add_tokens(caption, self._words, config.add_tokens, random)
        return repeat_words(caption, config.repeat_words, random) if config.repeat_words else caption
