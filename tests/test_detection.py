"""Detectors against independent references, on real classes at toy size."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from unrote.data import in_memory_store
from unrote.detection.membership import pia_scores
from unrote.detection.prompts import prompt_scores
from unrote.detection.roc import auc, separation, tpr_at_fpr
from unrote.errors import InputError
from unrote.models.denoiser import DenoisingLoss


def pictures(count, seed):
    random = np.random.default_rng(seed)
    return in_memory_store(random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), source="x")


def small_unet(seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def overfitted(store, steps=250):
    model, schedule = small_unet(), DDPMScheduler()
    loss, optimizer = DenoisingLoss(schedule, torch.device("cpu")), torch.optim.Adam(model.parameters(), 2e-3)
    clean = torch.from_numpy(np.array(store.images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    for _ in range(steps):
        timesteps = torch.randint(0, 500, (len(clean),))
        loss(model, clean, torch.randn_like(clean), timesteps, None).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), schedule


def test_auc_is_the_share_of_pairs_in_order():
    random = np.random.default_rng(0)
    members, others = random.integers(0, 9, 40).astype(float), random.integers(0, 7, 33).astype(float)
    brute = np.mean([(m > o) + 0.5 * (m == o) for m in members for o in others])
    assert auc(members, others) == pytest.approx(brute, abs=1e-12)


def test_tpr_allows_just_one_percent():
    others = np.arange(200.0)
    rate, threshold = tpr_at_fpr(np.array([197.0, 198.0, 250.0]), others, 0.01)
    assert threshold == 197 and (others > threshold).sum() == 2 and rate == pytest.approx(2 / 3)
    assert separation(others, others)["auc_interval"][0] < 0.5 < separation(others, others)["auc_interval"][1]


def test_members_of_an_overfitted_model_are_told_and_of_an_untrained_one_not():
    members, others = pictures(16, 0), pictures(200, 1)
    model, schedule = overfitted(members)
    scores = [pia_scores(model, schedule.alphas_cumprod, store) for store in (members, others)]
    assert separation(*scores)["auc_interval"][0] > 0.6
    fresh, many = small_unet(5).eval(), pictures(200, 2)
    scores = [pia_scores(fresh, schedule.alphas_cumprod, store) for store in (many, others)]
    low, high = separation(*scores)["auc_interval"]
    assert low < 0.5 < high


@torch.no_grad()
def test_pia_is_its_formula():
    model, schedule, store = small_unet().eval(), DDPMScheduler(), pictures(3, 0)
    x = torch.from_numpy(np.array(store.images[1])).permute(2, 0, 1)[None].double() / 127.5 - 1
    model64, alpha = model.double(), float(schedule.alphas_cumprod[100])
    noise = model64(x, 0).sample
    expected = -((noise - model64(alpha**0.5 * x + (1 - alpha) ** 0.5 * noise, 100).sample) ** 2).mean()
    found = pia_scores(model.float(), schedule.alphas_cumprod, store, timesteps=[100], batch_size=2)
    assert found[1] == pytest.approx(float(expected), rel=1e-3)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["red", "cat", "dog", "a"]
    letters = sorted(set("".join(words)))
    entries = [*letters, *(letter + "</w>" for letter in letters)]
    merges = ["r e", "re d</w>", "c a", "ca t</w>", "d o", "do g</w>"]
    entries += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(entries), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=12, projection_dim=16, eos_token_id=len(entries) - 1,
            bos_token_id=len(entries) - 2, pad_token_id=len(entries) - 1,
        )
    ).eval()  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, norm_num_groups=8,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_prompt_score_is_the_norm_of_the_difference(pipeline):
    from unrote.seeding import generator

    (found,) = prompt_scores(pipeline, ["red cat"], seeds=2)
    latents = torch.stack([torch.randn((4, 8, 8), generator=generator("prompt-norm", 0, i)) for i in range(2)])
    pipeline.scheduler.set_timesteps(50)
    with torch.no_grad():
        text, empty = pipeline.encode_prompt(["red cat"] * 2, "cpu", 1, True, negative_prompt=[""] * 2)
        timestep = pipeline.scheduler.timesteps[0]
        difference = pipeline.unet(latents, timestep, text).sample - pipeline.unet(latents, timestep, empty).sample
    expected = [float((row**2).sum() ** 0.5) for row in difference]
    np.testing.assert_allclose(found.per_seed, expected, rtol=1e-4)
    assert found.score == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_empty_prompt_scores_nothing_and_seeds_repeat(pipeline):
    empty, cat, again = prompt_scores(pipeline, ["", "cat", "cat"], steps=3, seeds=2)
    assert empty.score == pytest.approx(0, abs=1e-5) and cat.score > 1e-4 and cat == again


def test_a_prompt_trained_to_steer_stands_out_and_its_word_is_named(pipeline):
    """The UNet is trained to answer one prompt with one noise-independent picture: what memorization looks like."""
    tokenizer, encoder, unet = pipeline.tokenizer, pipeline.text_encoder, pipeline.unet

    def embed(text):
        ids = tokenizer(text, padding="max_length", max_length=12, return_tensors="pt").input_ids
        return encoder(ids)[0].detach()

    optimizer, target = torch.optim.Adam(unet.parameters(), 2e-3), 3 * torch.randn(1, 4, 8, 8)
    states = torch.cat([embed("red cat"), embed("red dog"), embed("a dog"), embed("")])
    for _ in range(80):
        noisy = torch.randn(1, 4, 8, 8).expand(4, -1, -1, -1)
        wanted = noisy.clone()
        wanted[0] = target
        (unet(noisy, 981, states).sample - wanted).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    cat, *others = prompt_scores(pipeline, ["red cat", "red dog", "a dog"], tokens=True)
    assert cat.score > 1.5 * max(one.score for one in others)
    assert [word for word, _ in cat.tokens] == ["red</w>", "cat</w>"] and cat.tokens[1][1] > cat.tokens[0][1]


def test_what_is_no_text_pipeline_is_refused():
    with pytest.raises(InputError, match="unet"):
        prompt_scores(object(), ["x"])
