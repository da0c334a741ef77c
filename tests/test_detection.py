"""Detectors against independent references, on real classes at toy size."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusers import DDPMScheduler, UNet2DModel

from unrote.cli import cli
from unrote.data import in_memory_store
from unrote.detection.membership import attacked_timesteps, labelled_as, pia_scores
from unrote.detection.prompts import prompt_scores, read_prompts
from unrote.detection.roc import auc, separation, tpr_at_fpr
from unrote.errors import InputError
from unrote.measures import rank_prompts
from unrote.models.denoiser import DenoisingLoss
from unrote.seeding import generator


def pictures(count, seed):
    random = np.random.default_rng(seed)
    return in_memory_store(random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8), source="x")


def small_unet(seed=0, **options):
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **options,
    )


def overfitted(store, steps=400):
    model, schedule = small_unet(), DDPMScheduler()
    loss, optimizer = DenoisingLoss(schedule, torch.device("cpu")), torch.optim.Adam(model.parameters(), 4e-3)
    clean = torch.from_numpy(np.array(store.images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    for _ in range(steps):
        timesteps = torch.randint(0, 400, (len(clean),))
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
    members, others = pictures(8, 0), pictures(200, 1)
    model, schedule = overfitted(members)
    scores = [pia_scores(model, schedule.alphas_cumprod, store) for store in (members, others)]
    assert separation(*scores)["auc"] > 0.8 and separation(*scores)["auc_interval"][0] > 0.6
    fresh, many = small_unet(5).eval(), pictures(200, 2)
    scores = [pia_scores(fresh, schedule.alphas_cumprod, store) for store in (many, others)]
    low, high = separation(*scores)["auc_interval"]
    assert low < 0.5 < high


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_pia_is_its_formula(kind):
    """Clean image and noise from the output by the definitions of the three, in float64."""
    model, schedule, store = small_unet().eval(), DDPMScheduler(), pictures(3, 0)
    x0 = torch.from_numpy(np.array(store.images[1])).permute(2, 0, 1)[None].double() / 127.5 - 1
    model64 = model.double()

    def noise(x, t):
        alpha, output = float(schedule.alphas_cumprod[t]), model64(x, t).sample
        if kind == "epsilon":
            return output
        if kind == "sample":  # x = √ᾱ x₀ + √(1−ᾱ) ε
            return (x - alpha**0.5 * output) / (1 - alpha) ** 0.5
        clean = alpha**0.5 * x - (1 - alpha) ** 0.5 * output  # v = √ᾱ ε − √(1−ᾱ) x₀
        return (x - alpha**0.5 * clean) / (1 - alpha) ** 0.5

    alpha, own = float(schedule.alphas_cumprod[100]), noise(x0, 0)
    difference = own - noise(alpha**0.5 * x0 + (1 - alpha) ** 0.5 * own, 100)
    expected = -torch.linalg.vector_norm(difference, 4) / difference.numel() ** 0.25
    options = {"timesteps": [100], "prediction_type": kind}
    found = pia_scores(model.float(), schedule.alphas_cumprod, store, batch_size=2, **options)
    assert found[1] == pytest.approx(float(expected), rel=1e-3)
    alone = pia_scores(model, schedule.alphas_cumprod, store.subset([1]), **options)
    assert alone[0] == pytest.approx(found[1], rel=1e-4)


def test_levels_follow_the_schedule():
    assert attacked_timesteps(1000) == (50, 100, 200, 300) and attacked_timesteps(10) == (0, 1, 2, 3)
    few = DDPMScheduler(num_train_timesteps=10)
    assert np.isfinite(pia_scores(small_unet().eval(), few.alphas_cumprod, pictures(2, 0))).all()


def test_classes_of_held_out_images_are_matched_by_name():
    members = replace(pictures(4, 0), labels=np.array([0, 1, 2, 0]), class_names=("cat", "dog", "owl"))
    others = replace(pictures(2, 1), labels=np.array([0, 1]), class_names=("dog", "owl"))
    assert labelled_as(others, members).labels.tolist() == [1, 2]
    with pytest.raises(InputError, match="'elk'"):
        labelled_as(replace(others, class_names=("dog", "elk")), members)
    with pytest.raises(InputError, match="no classes"):
        labelled_as(pictures(2, 1), members)
    conditional = small_unet(num_class_embeds=3).eval()
    alphas = DDPMScheduler().alphas_cumprod
    scores = pia_scores(conditional, alphas, replace(pictures(2, 1), labels=np.array([1, 2])), timesteps=[50])
    swapped = pia_scores(conditional, alphas, replace(pictures(2, 1), labels=np.array([2, 1])), timesteps=[50])
    assert (scores != swapped).all()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    pytest.importorskip("transformers")
    from tiny_pipelines import tiny_stable_diffusion

    return tiny_stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


def noises(count):
    return torch.stack([torch.randn((4, 8, 8), generator=generator("prompt-norm", 0, index)) for index in range(count)])


def test_prompt_score_is_the_norm_of_the_difference(pipeline):
    """Three steps with guidance, by the pipeline's own embedding and scheduler."""
    (found,) = prompt_scores(pipeline, ["red cat"], seeds=2, steps=3, num_inference_steps=20, guidance_scale=5.0)
    latents, norms = noises(2), []
    pipeline.scheduler.set_timesteps(20)
    with torch.no_grad():
        text, empty = pipeline.encode_prompt(["red cat"] * 2, "cpu", 1, True, negative_prompt=[""] * 2)
        for timestep in pipeline.scheduler.timesteps[:3]:
            steered, free = (pipeline.unet(latents, timestep, states).sample for states in (text, empty))
            norms.append([float((row**2).sum() ** 0.5) for row in steered - free])
            latents = pipeline.scheduler.step(free + 5 * (steered - free), timestep, latents).prev_sample
    np.testing.assert_allclose(found.per_seed, np.mean(norms, axis=0), rtol=1e-4)
    assert found.score == pytest.approx(np.mean(norms), rel=1e-4)


def test_token_gradients_are_finite_differences(pipeline):
    """Along its own gradient, the norm changes by the gradient's norm."""
    (found,) = prompt_scores(pipeline, ["red cat"], seeds=2, tokens=True)
    latents, timestep = noises(2).double(), pipeline.scheduler.timesteps[0]
    with torch.no_grad():
        text, empty = pipeline.encode_prompt(["red cat"], "cpu", 1, True, negative_prompt=[""])
    text, unet = text.double(), pipeline.unet.double()
    pipeline.scheduler.set_timesteps(50)
    timestep = pipeline.scheduler.timesteps[0]

    @torch.no_grad()
    def norm(states):
        steered, free = (unet(latents, timestep, one.expand(2, -1, -1)).sample for one in (states, empty.double()))
        return (steered - free).flatten(1).norm(dim=1).mean()

    for place, (_, value) in enumerate(found.tokens, 1):  # place 0 is the start of text
        slopes = []
        for axis in range(text.shape[2]):
            step = torch.zeros_like(text)
            step[0, place, axis] = 1e-5
            slopes.append(float(norm(text + step) - norm(text - step)) / 2e-5)
        assert value == pytest.approx(float(np.linalg.norm(slopes)), rel=1e-2)
    pipeline.unet.float()


def test_a_prompt_does_not_depend_on_others_nor_change_the_pipeline(pipeline):
    before = [parameter.requires_grad for parameter in pipeline.unet.parameters()], pipeline.unet.training
    state = torch.get_rng_state()
    empty, cat, again = prompt_scores(pipeline, ["", "cat", "cat"], steps=3, seeds=2, tokens=True)
    assert empty.score == pytest.approx(0, abs=1e-5) and cat.score > 1e-4 and cat == again and empty.tokens == ()
    assert prompt_scores(pipeline, ["cat"], steps=3, seeds=2, tokens=True) == [cat]
    np.testing.assert_allclose(
        prompt_scores(pipeline, ["cat"], steps=3, seeds=4)[0].per_seed[:2], cat.per_seed, rtol=1e-4
    )
    assert before == ([parameter.requires_grad for parameter in pipeline.unet.parameters()], pipeline.unet.training)
    assert torch.equal(state, torch.get_rng_state())


def test_a_sampler_with_noise_of_its_own_repeats(pipeline):
    from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler

    for scheduler in (DDPMScheduler(), EulerAncestralDiscreteScheduler()):
        parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "tokenizer")}
        other = SimpleNamespace(**parts, scheduler=scheduler)
        assert prompt_scores(other, ["cat"], steps=4, seeds=2) == prompt_scores(other, ["cat"], steps=4, seeds=2)


def test_a_text_that_is_cut_off_says_so(pipeline):
    short, long = prompt_scores(pipeline, ["red cat", "red cat " * 20], seeds=1, tokens=True)
    assert long.truncated and not short.truncated and len(long.tokens) == 10


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


def test_what_is_no_text_pipeline_is_refused(pipeline, tmp_path):
    with pytest.raises(InputError, match="unet"):
        prompt_scores(object(), ["x"])
    parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder", "tokenizer", "scheduler")}
    with pytest.raises(InputError, match="SDXL"):
        prompt_scores(SimpleNamespace(**parts, text_encoder_2=object()), ["x"])
    with pytest.raises(InputError, match="no text"):
        prompt_scores(SimpleNamespace(**(parts | {"unet": small_unet()})), ["x"])
    with pytest.raises(InputError, match="list of texts"):
        prompt_scores(pipeline, "x")
    with pytest.raises(InputError, match="seeds"):
        prompt_scores(pipeline, ["x"], seeds=0)
    (tmp_path / "p.txt").write_text("cat\n")
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match=str(folder)):
            rank_prompts(folder, tmp_path / "p.txt")


def test_files_of_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffred cat\r\n\n  a dog \n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "red\\ncat"}\n{"prompt": "a dog"}\n')
    assert read_prompts(tmp_path / "a.txt") == ["red cat", "a dog"]
    assert read_prompts(tmp_path / "a.jsonl") == ["red\ncat", "a dog"]
    for name, content in (("b.txt", b"\n"), ("b.jsonl", b"[1]"), ("c.jsonl", b"{"), ("d.txt", b"\xff\xfe")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            read_prompts(tmp_path / name)
    with pytest.raises(InputError, match=r"e\.txt"):
        read_prompts(tmp_path / "e.txt")


def test_the_command_ranks_the_prompts_of_a_saved_pipeline(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    (tmp_path / "p.txt").write_text("a dog\nred cat\n\x1b[31mcat\n")
    options = ["prompts", str(tmp_path / "model"), "--prompts", str(tmp_path / "p.txt"), "--device", "cpu"]
    command = [sys.executable, "-m", "unrote", *options, "--tokens", "--json"]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["prompts"]
    assert [row["rank"] for row in rows] == [1, 2, 3] and sorted(row["index"] for row in rows) == [0, 1, 2]
    expected = {one.prompt: one.score for one in prompt_scores(pipeline, ["a dog", "red cat", "\x1b[31mcat"])}
    assert {row["prompt"]: row["score"] for row in rows} == pytest.approx(expected, rel=1e-3)
    text = CliRunner().invoke(cli, options, catch_exceptions=False).stdout
    assert "\x1b" not in text and "red cat" in text
