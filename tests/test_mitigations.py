"""Text-side mitigations: what they do, how often, and that nothing but the seed decides."""

import json
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch

from unrote.config import TextConfig
from unrote.errors import InputError
from unrote.text.mitigations import (
    TextPolicy,
    add_tokens,
    noisy_embeddings,
    prediction_norm,
    repeat_words,
    replace_caption,
    replace_tokens,
    vocabulary,
)

WORDS = ["sun", "moon", "star"]


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """CLIP's kind of tokenizer that knows four words; letters and pieces of words are tokens of it too."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(set("redcatdog"))
    entries = [*letters, *(letter + "</w>" for letter in letters)]
    merges = ["r e", "re d</w>", "c a", "ca t</w>", "d o", "do g</w>"]
    entries += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def test_caption_replacement_happens_as_often_as_asked_and_is_four_random_words():
    random = Random(0)
    texts = [replace_caption("a red cat", WORDS, 0.3, random) for _ in range(4000)]
    replaced = [text.split() for text in texts if text != "a red cat"]
    assert len(replaced) / 4000 == pytest.approx(0.3, abs=0.03)
    assert all(len(text) == 4 and set(text) <= set(WORDS) for text in replaced)
    counts = Counter(word for text in replaced for word in text)
    assert min(counts.values()) > 0.9 * sum(counts.values()) / 3, "every word is as likely"


def test_token_replacement_judges_each_word_and_keeps_the_others_in_place():
    random, own = Random(0), ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"]
    texts = [replace_tokens(" ".join(own), WORDS, 0.2, random).split() for _ in range(1000)]
    assert all(len(text) == 10 for text in texts)
    changed = np.array([[new != old for new, old in zip(text, own, strict=True)] for text in texts])
    assert changed.mean() == pytest.approx(0.2, abs=0.02) and changed.mean(0).min() > 0.15
    assert {word for text in texts for word in text} == {*own, *WORDS}


def test_token_addition_keeps_the_caption_in_order_and_puts_words_anywhere():
    random = Random(0)
    texts = [add_tokens("a red cat", WORDS, 2, random).split() for _ in range(500)]
    assert all(len(text) == 5 and [word for word in text if word not in WORDS] == ["a", "red", "cat"] for text in texts)
    places = Counter(place for text in texts for place, word in enumerate(text) if word in WORDS)
    assert set(places) == {0, 1, 2, 3, 4}


def test_word_repeat_adds_only_words_of_the_caption():
    random = Random(0)
    texts = [repeat_words("a red cat", 0.5, random) for _ in range(2000)]
    repeated = [text.split() for text in texts if text != "a red cat"]
    assert len(repeated) / 2000 == pytest.approx(0.5, abs=0.04)
    assert all(len(text) == 5 and not Counter(["a", "red", "cat"]) - Counter(text) for text in repeated)
    assert all(set(text) == {"a", "red", "cat"} for text in repeated)


def test_chance_zero_and_the_empty_caption_change_nothing():
    random = Random(0)
    spaced = "a  red\tcat"
    assert replace_caption(spaced, WORDS, 0.0, random) == repeat_words(spaced, 0.0, random) == spaced
    for text in (
        replace_caption("", WORDS, 1.0, random),
        replace_tokens("", WORDS, 1.0, random),
        add_tokens("", WORDS, 3, random),
        repeat_words("", 1.0, random),
        repeat_words(" ", 1.0, random).strip(),
    ):
        assert text == ""


def test_noise_has_the_asked_deviation_in_the_type_of_the_embeddings():
    embeddings = torch.full((64, 8, 32), 3.0)
    noise = noisy_embeddings(embeddings, 0.1, draws()) - embeddings
    assert float(noise.std()) == pytest.approx(0.1, rel=0.03) and abs(float(noise.mean())) < 3e-3
    half = noisy_embeddings(embeddings.bfloat16(), 0.1, draws())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), embeddings + noise, atol=0.02, rtol=0)


def test_prediction_norm_is_the_distance_of_two_predictions():
    conditional, unconditional = torch.randn(2, 5, 4, 8, 8, generator=draws())
    expected = np.sqrt(((conditional - unconditional).double().numpy() ** 2).sum((1, 2, 3)))
    np.testing.assert_allclose(prediction_norm(conditional, unconditional), expected, rtol=1e-5)
    assert prediction_norm(conditional.bfloat16(), unconditional.bfloat16()).dtype == torch.float32


def test_random_words_are_whole_tokens(tokenizer):
    words = vocabulary(tokenizer)
    assert {"red", "cat", "dog", "a"} <= set(words)
    assert not {"ca", "re", "do", "<|startoftext|>"} & set(words), "pieces of words and marks are no words"
    for word in words:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    longer = tokenizer(add_tokens("red cat", words, 3, Random(0)), add_special_tokens=False).input_ids
    assert len(longer) == 5

    class Letterless:
        all_special_ids = (0,)
        batch_decode = staticmethod(lambda rows: ["" for _ in rows])
        __len__ = lambda self: 3  # noqa: E731
        __call__ = lambda self, words, **_: type("Ids", (), {"input_ids": [[] for _ in words]})  # noqa: E731

    with pytest.raises(InputError, match="no random words"):
        vocabulary(Letterless())


CAPTIONS = [["red cat", "a cat"], ["a dog"], [], ["dog", "red dog", "a red dog"]]
EVERY = {
    "caption": "random", "dropout": 0.1, "replace_caption": 0.2, "replace_tokens": 0.2, "add_tokens": 1,
    "repeat_words": 0.3, "embedding_noise": 0.1,
}  # fmt: skip


def test_the_default_is_the_first_caption_and_draws_nothing(tokenizer):
    policy, generator = TextPolicy(TextConfig(), tokenizer, CAPTIONS), draws()
    before = generator.get_state()
    assert policy.captions_for(torch.tensor([3, 0, 2, 0]), generator) == ["dog", "red cat", "", "red cat"]
    embeddings = torch.randn(4, 12, 16)
    assert policy.noisy(embeddings, generator) is embeddings
    assert torch.equal(before, generator.get_state())
    assert policy.texts() == ["", "a dog", "dog", "red cat"]


def test_one_of_several_captions_each_as_likely(tokenizer):
    policy = TextPolicy(TextConfig(caption="random"), tokenizer, CAPTIONS)
    drawn = policy.captions_for(torch.tensor([3, 1] * 3000), draws())
    counts = Counter(drawn[::2])
    assert set(counts) == set(CAPTIONS[3]) and min(counts.values()) > 900
    assert set(drawn[1::2]) == {"a dog"}
    assert policy.texts() == sorted({"", *(text for texts in CAPTIONS for text in texts)})


def test_prompt_dropout_gives_the_empty_text_untouched(tokenizer):
    config = TextConfig(dropout=0.25, add_tokens=2, replace_caption=0.5, repeat_words=0.5)
    drawn = TextPolicy(config, tokenizer, CAPTIONS).captions_for(torch.zeros(4000, dtype=torch.long), draws())
    assert sum(text == "" for text in drawn) / 4000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("name", ["replace_caption", "replace_tokens", "add_tokens", "repeat_words"])
def test_each_mitigation_alone_is_its_function_and_makes_texts_vary(tokenizer, name):
    config = TextConfig(**{name: 1})
    policy = TextPolicy(config, tokenizer, [["a red cat"]])
    assert config.varies and policy.texts() == ["", "a red cat"]
    lengths = {len(text.split()) for text in policy.captions_for(torch.zeros(50, dtype=torch.long), draws())}
    assert lengths == {{"replace_caption": 4, "replace_tokens": 3, "add_tokens": 4, "repeat_words": 5}[name]}


def test_the_same_seed_gives_the_same_texts_and_takes_one_number(tokenizer):
    policy, indices = TextPolicy(TextConfig(**EVERY), tokenizer, CAPTIONS), torch.arange(4).repeat(50)
    first, second, other = (policy.captions_for(indices, draws(seed)) for seed in (5, 5, 6))
    assert first == second != other
    assert {text for text, index in zip(other, indices.tolist(), strict=True) if index == 2} == {""}
    long, short = draws(5), draws(5)
    policy.captions_for(indices, long)
    policy.captions_for(indices[:1], short)
    assert torch.equal(torch.rand(3, generator=long), torch.rand(3, generator=short))
    again = TextPolicy(TextConfig(**EVERY), tokenizer, CAPTIONS)
    assert again.captions_for(indices, draws(5)) == first
    embeddings = torch.randn(4, 12, 16)
    assert torch.equal(policy.noisy(embeddings, draws(1)), noisy_embeddings(embeddings, 0.1, draws(1)))
