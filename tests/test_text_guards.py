"""Guards of the text, on real Stable Diffusion classes at toy size."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from diffusers.callbacks import MultiPipelineCallbacks

from tiny_pipelines import tiny_stable_diffusion, tiny_stable_diffusion_xl
from unrote.data import in_memory_store
from unrote.errors import InputError
from unrote.guards.attention import AttentionReweighting, _Processor
from unrote.guards.callback import GuardCallback
from unrote.guards.embeddings import PromptOptimization
from unrote.guards.guidance import AntiMemorizationGuidance
from unrote.guards.prompts import EmbeddingNoise, RandomTokens, RepeatWords
from unrote.sampling import make_scheduler, sample
from unrote.seeding import generator
from unrote.text.mitigations import noisy_embeddings

FEW = {"steps": 2, "batch_size": 2}
PROMPTS = ["red cat", "a dog", "a red dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion(root / "tokenizer", vae_levels=2).save_pretrained(root / "model")
    return root / "model"


@pytest.fixture
def pipeline(folder):
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def pixels_in(where):
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(where.glob("*.png"))])


def rows_of(where):
    return [json.loads(line) for line in (where / "samples.jsonl").read_text().splitlines()]


def made(folder, where, guards, num=3, **changed):
    return sample(folder, num, prompts=PROMPTS, out=where, guards=guards, **(FEW | changed))


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    return pixels_in(made(folder, tmp_path_factory.mktemp("plain") / "samples", []))


GUARDS = [
    "random-tokens:count=2",
    "repeat-words",
    "embedding-noise:std=0.5",
    "prompt-optimization:target=1e-9",
    "attention",
]


@pytest.mark.parametrize("guard", GUARDS)
def test_every_guard_changes_images_and_each_apart_from_the_others(folder, plain, tmp_path, guard):
    together = pixels_in(made(folder, tmp_path / "three", [guard]))
    assert (together != plain).any()
    single = pixels_in(made(folder, tmp_path / "single", [guard], batch_size=1))
    assert np.abs(single - together).max() <= 1
    few = pixels_in(made(folder, tmp_path / "few", [guard], num=1))
    np.testing.assert_array_equal(few, together[:1])


def test_guards_with_nothing_to_do_leave_images_as_they_are(folder, plain, tmp_path):
    idle = ["embedding-noise:std=0", "prompt-optimization:target=1e9"]
    found = pixels_in(made(folder, tmp_path / "idle", idle))
    np.testing.assert_array_equal(found, plain)


def test_the_prompt_that_was_used_is_said(folder, tmp_path):
    where = made(folder, tmp_path / "samples", ["random-tokens:count=2", "repeat-words"], num=4)
    for row in rows_of(where):
        own, used = row["prompt"].split(), row["guarded_prompt"].split()
        assert len(used) == len(own) + 4, "two random words, then two of what is there"
    assert rows_of(where)[0]["prompt"] == rows_of(where)[3]["prompt"]
    assert rows_of(where)[0]["guarded_prompt"] != rows_of(where)[3]["guarded_prompt"]


def test_a_text_guard_is_a_function_of_prompt_and_seed():
    guard = RandomTokens(["x", "y"], 3)
    assert guard.text("a b", 1) == guard.text("a b", 1)
    assert len({guard.text("a b", seed) for seed in range(20)}) > 5
    assert guard.text("", 1) == "", "the empty text stays empty"
    assert sorted(set(RepeatWords().text("a b", 4).split())) == ["a", "b"]
    noise = torch.zeros(2, 2)
    expected = noisy_embeddings(torch.zeros(3, 4), 0.2, generator(5, "embedding-noise"))
    torch.testing.assert_close(EmbeddingNoise(0.2).embedding(None, torch.zeros(3, 4), noise, noise, 5), expected)


def norms(pipeline, embedding, empty, noise):
    """How strongly the text steers the first step, by the definition."""
    pipeline.scheduler.set_timesteps(2)
    time = pipeline.scheduler.timesteps[0]
    steered = pipeline.unet(noise[None], time, encoder_hidden_states=embedding[None]).sample
    return float((steered - pipeline.unet(noise[None], time, encoder_hidden_states=empty[None]).sample).norm())


@torch.no_grad()
def test_optimization_stops_below_the_target(pipeline):
    embedding = pipeline.encode_prompt("red cat", "cpu", 1, False)[0][0]
    empty = pipeline.encode_prompt("", "cpu", 1, False)[0][0]
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    before = norms(pipeline, embedding, empty, noise)
    guard = PromptOptimization(0.7 * before, steps=100)
    changed = guard.embedding(pipeline, embedding, empty, noise, 0)
    assert norms(pipeline, changed, empty, noise) < 0.7 * before
    short = PromptOptimization(0.7 * before, steps=1).embedding(pipeline, embedding, empty, noise, 0)
    assert (short != embedding).any()
    assert norms(pipeline, short, empty, noise) < before
    same = PromptOptimization(1.01 * before).embedding(pipeline, embedding, empty, noise, 0)
    torch.testing.assert_close(same, embedding, rtol=0, atol=0)


def test_optimization_looks_at_the_noise_that_the_pipeline_starts_from(folder, tmp_path, monkeypatch):
    seen, starts = [], []
    whole = PromptOptimization.embedding

    def spy(self, pipeline, embedding, empty, noise, seed):
        seen.append(noise)
        return whole(self, pipeline, embedding, empty, noise, seed)

    monkeypatch.setattr(PromptOptimization, "embedding", spy)
    from diffusers import UNet2DConditionModel

    forward = UNet2DConditionModel.forward

    def watched(self, x, *arguments, **options):
        starts.append(x)
        return forward(self, x, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    made(folder, tmp_path / "samples", ["prompt-optimization:target=1e9"], num=1, batch_size=1)
    batch = next(x for x in starts if len(x) == 2)
    torch.testing.assert_close(batch[1].cpu(), seen[0], rtol=0, atol=0)


@torch.no_grad()
def test_attention_ignores_the_end_and_the_padding(pipeline):
    """With the logits of the beginning as they are, it is what attention to the beginning and the words alone gives."""
    prompts = ["red cat", "a"]
    text = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    free = pipeline.encode_prompt(["", ""], "cpu", 1, False)[0]
    x, time = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(500)
    pipeline._guidance_scale = 7.5  # as in a call
    usual = pipeline.unet(x, time, encoder_hidden_states=torch.cat([free, text])).sample
    with AttentionReweighting(1.0).on(pipeline, prompts):
        found = pipeline.unet(x, time, encoder_hidden_states=torch.cat([free, text])).sample
    torch.testing.assert_close(found[:2], usual[:2], rtol=1e-4, atol=1e-5)
    for row, words in ((0, 2), (1, 1)):
        cut = pipeline.unet(x[2 + row :][:1], time, encoder_hidden_states=text[row : row + 1, : words + 1]).sample
        torch.testing.assert_close(found[2 + row :][:1], cut, rtol=1e-4, atol=1e-5)
    again = pipeline.unet(x, time, encoder_hidden_states=torch.cat([free, text])).sample
    torch.testing.assert_close(again, usual, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_attention_is_guarded_in_every_image_of_a_prompt(pipeline, scale):
    def images(prompts, **more):
        noises = [torch.Generator().manual_seed(seed) for seed in range(4)]
        options = {"num_inference_steps": 2, "guidance_scale": scale, "generator": noises, "output_type": "np"}
        return pipeline(prompts, **options, **more).images

    guard, each = AttentionReweighting(), ["red cat", "red cat", "a", "a"]
    with guard.on(pipeline, each):
        expected = images(each)
    with guard.on(pipeline, ["red cat", "a"]):
        found = images(["red cat", "a"], num_images_per_prompt=2)
    np.testing.assert_array_equal(found, expected)
    plain = images(each)
    assert all((found[row] != plain[row]).any() for row in range(4))
    with guard.on(pipeline, ["red cat"] * 3), pytest.raises(InputError, match=r"made for 3 prompts.*makes 4 images"):
        images(each)


@torch.no_grad()
def test_attention_in_fp16_is_scaled_before_it_could_overflow(pipeline):
    """Of the same weights in fp32 it differs by rounding only, where a product of query and key is beyond 65,504."""
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer, text = (
        Attention(query_dim=64, cross_attention_dim=8, heads=1, dim_head=64, scale_qk=True),
        torch.randn(1, 7, 8),
    )
    for part in (layer.to_q, layer.to_k):
        part.weight.mul_(500)
    x = torch.randn(1, 16, 64)
    assert (layer.to_q(x) @ layer.to_k(text).mT).abs().max() > 65_504
    kept, layer.to_q.weight[:] = torch.ones(1, 7, dtype=torch.bool), layer.to_q.weight.half().float()
    processor = _Processor(layer.processor, kept, 1.0, lambda: False)
    expected = processor(layer.half().float(), x.half().float(), text.half().float())
    found = processor(layer.half(), x.half(), text.half())
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_a_callback_is_for_one_prompt_an_image(pipeline, scale):
    callback = GuardCallback(pipeline, ["repeat-words"], ["red cat"], [0])
    with pytest.raises(InputError, match="made for 1 images, and the call makes 2"):
        pipeline(
            "red cat", num_inference_steps=2, num_images_per_prompt=2, guidance_scale=scale,
            callback_on_step_end=callback,
        )  # fmt: skip


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_guard_does_nearly_the_same(folder, half):
    """Near by the size of what the guard changes, which rounding alone does not reach."""
    from diffusers import DiffusionPipeline

    train = captioned()

    def images(dtype, guards):
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, low_cpu_mem_usage=False)
        pipeline.vae.register_to_config(scaling_factor=SPREAD)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = make_scheduler(pipeline.scheduler, "ddim", 10, clip_sample=False)
        callback = GuardCallback(pipeline, guards, PROMPTS[:2], [0, 1], train=train) if guards else None
        noises = [torch.Generator().manual_seed(seed) for seed in range(2)]
        options = {"num_inference_steps": 10, "generator": noises, "output_type": "latent"}
        return pipeline(PROMPTS[:2], callback_on_step_end=callback, **options).images.float()

    images(half, ["amg:threshold=1"])  # training images are encoded
    guards = ["prompt-optimization:target=1e-9,steps=4", "attention"]
    effect = images(torch.float32, guards) - images(torch.float32, [])
    found = images(half, guards) - images(half, [])
    assert (found - effect).norm() < 0.5 * effect.norm()


SPREAD = 700.0
CALLED_BACK = [
    ["random-tokens:count=2"],
    ["repeat-words"],
    ["embedding-noise:std=0.5"],
    ["prompt-optimization:target=1e-9,steps=2"],
    ["attention"],
    ["amg:threshold=1,strength=0.5,deduplicate=2"],
    ["amg:threshold=1", "attention", "random-tokens:count=1", "embedding-noise"],
]


@pytest.fixture(scope="module")
def training_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("train") / "train.npz"
    np.savez(path, images=captioned().images, captions=np.array(captioned().captions))
    return path


@pytest.mark.parametrize("guards", CALLED_BACK, ids=lambda guards: "+".join(one.partition(":")[0] for one in guards))
def test_as_a_callback_of_a_plain_pipeline_a_guard_does_what_the_command_does(folder, training_file, tmp_path, guards):
    """Byte for byte: the images of `unrote sample --guard`, two of one batch; and the pipeline is as before."""
    from diffusers import DiffusionPipeline

    # Latents of training images as far apart as what the denoiser makes, or no image would be nearer to one of them.
    pipeline = DiffusionPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.vae.register_to_config(scaling_factor=SPREAD)
    pipeline.save_pretrained(tmp_path / "model")
    named = [f"{one},train={training_file}" if one.startswith("amg") else one for one in guards]
    where = made(tmp_path / "model", tmp_path / "samples", named, num=2, steps=10)
    seeds = [row["generator_seed"] for row in rows_of(where)]
    pipeline.scheduler = make_scheduler(pipeline.scheduler, "ddim", 10, clip_sample=False)

    def images(**more):
        noises = [torch.Generator().manual_seed(seed) for seed in seeds]
        found = pipeline(PROMPTS[:2], generator=noises, num_inference_steps=10, output_type="np", **more).images
        return (found * 255).round().astype(int)

    plain = images()

    callback = GuardCallback(pipeline, guards, PROMPTS[:2], seeds, train=training_file)
    guarded = images(callback_on_step_end=callback)
    np.testing.assert_array_equal(guarded, pixels_in(where))
    assert (guarded != plain).any()
    np.testing.assert_array_equal(images(), plain, "nothing is left in the pipeline")
    together = MultiPipelineCallbacks([GuardCallback(pipeline, guards, PROMPTS[:2], seeds, train=training_file)])
    np.testing.assert_array_equal(images(callback_on_step_end=together), guarded)


def test_what_no_callback_can_do_is_refused_with_the_way_out(pipeline, tmp_path):
    for guards, prompts, seeds, message in (
        (["copy-filter:train=x"], ["a"], [0], "put CopyFilter around the call"),
        (["attention"], ["a", "cat"], [0], "2 prompts and 1 seeds"),
        (["amg"], ["a"], [0], "add train=DATA"),
    ):
        with pytest.raises(InputError, match=message):
            GuardCallback(pipeline, guards, prompts, seeds)
    three, before = ["red cat", "a dog", "cat"], dict(pipeline.unet.attn_processors)
    for guards, prompts in ((["repeat-words"], three[:1]), (["attention"], three[:2])):
        callback = GuardCallback(pipeline, guards, prompts, range(len(prompts)))
        with pytest.raises(InputError, match=f"made for {len(prompts)} images, and the call makes 3"):
            pipeline(three, num_inference_steps=2, callback_on_step_end=callback)
        assert pipeline.unet.attn_processors == before
        assert not pipeline.unet._forward_pre_hooks
    large = tiny_stable_diffusion_xl(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="SDXL is in two embeddings"):
        GuardCallback(large, ["repeat-words"], ["red cat"], [0])


def test_one_whose_embedding_fails_leaves_the_pipeline_as_it_was(pipeline, monkeypatch):
    callback = GuardCallback(pipeline, ["embedding-noise", "attention"], ["red cat"], [0])
    before = pipeline.unet._forward_pre_hooks
    assert before

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(EmbeddingNoise, "embedding", fails)
        pipeline("red cat", num_inference_steps=2, callback_on_step_end=callback)
    assert not pipeline.unet._forward_pre_hooks
    assert not any(isinstance(one, _Processor) for one in pipeline.unet.attn_processors.values())


def edit_pipelines(pipeline):
    """LEDITS++ guides by several edits at once, InstructPix2Pix by text and image, PAG has a third part."""
    from diffusers import (
        DDIMScheduler,
        LEditsPPPipelineStableDiffusion,
        StableDiffusionInstructPix2PixPipeline,
        StableDiffusionPAGPipeline,
        UNet2DConditionModel,
    )

    parts = {name: pipeline.components[name] for name in ("vae", "text_encoder", "tokenizer", "feature_extractor")}
    parts |= {"safety_checker": None, "requires_safety_checker": False}
    beside = UNet2DConditionModel.from_config({**pipeline.unet.config, "in_channels": 8})
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config)
    yield LEditsPPPipelineStableDiffusion(**parts, unet=pipeline.unet, scheduler=ddim)
    yield StableDiffusionInstructPix2PixPipeline(**parts, unet=beside, scheduler=ddim)
    own = UNet2DConditionModel.from_config(pipeline.unet.config)
    yield StableDiffusionPAGPipeline(**parts, unet=own, scheduler=ddim, pag_applied_layers="mid")


def test_pipelines_that_put_their_batches_together_otherwise_are_refused(pipeline):
    for edits in edit_pipelines(pipeline):
        said = f"{type(edits).__name__} puts its batches together in a way of its own; .* CopyFilter"
        for guard in ("attention", "repeat-words"):
            with pytest.raises(InputError, match=said):
                GuardCallback(edits, [guard], ["red cat"], [0])
        with AttentionReweighting().on(edits, ["red cat"]), pytest.raises(InputError, match=said):
            edits._guidance_scale = 7.5
            text = torch.zeros(3, edits.tokenizer.model_max_length, edits.unet.config.cross_attention_dim)
            edits.unet(torch.zeros(3, edits.unet.config.in_channels, 8, 8), 5, encoder_hidden_states=text)


def captioned(count=6):
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (count, 16, 16, 3)).astype(np.uint8)
    return in_memory_store(pixels, source="captioned", captions=PROMPTS * 2)


def test_guidance_knows_latents_captions_and_scale(folder, pipeline, tmp_path, monkeypatch):
    store, scales = captioned(), []
    np.savez(tmp_path / "train.npz", images=store.images, captions=np.array(store.captions))
    whole = AntiMemorizationGuidance._changed
    guards = []

    def watched(self, step):
        guards.append(self)
        scales.append((step.scale, len(step.x), step.batch))
        return whole(self, step)

    monkeypatch.setattr(AntiMemorizationGuidance, "_changed", watched)
    amg = f"amg:train={tmp_path / 'train.npz'},threshold=0.001,deduplicate=2"
    made(folder, tmp_path / "samples", [amg], num=2, guidance_scale=5.0)
    assert scales == [(5.0, 2, 4)] * 2
    pixels = torch.from_numpy(store.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean * pipeline.vae.config.scaling_factor
        texts = pipeline.encode_prompt([store.captions[4], store.captions[0]], "cpu", 1, False)[0]
    torch.testing.assert_close(guards[0]._references, latents.flatten(1))
    torch.testing.assert_close(guards[0]._embed([4, 0])["encoder_hidden_states"], texts)


def test_a_plain_pipeline_is_guided_too_each_image_by_itself(pipeline):
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def images(seeds, **options):
        noises = [torch.Generator().manual_seed(seed) for seed in seeds]
        options |= {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np"}
        return pipeline(["red cat"] * len(noises), generator=noises, **options).images

    before = images([0, 1])
    for settings in ({"despecify": 4.0, "strength": 0.0}, {"strength": 0.5}):
        with AntiMemorizationGuidance(latents, threshold=1.0, clip=False, **settings).on(pipeline):
            together = images([0, 1])
            alone = [images([seed])[0] for seed in (0, 1)]
        assert (together != before).any(), settings
        np.testing.assert_allclose(together, np.stack(alone), atol=2e-3)
    np.testing.assert_array_equal(images([0, 1]), before)


def test_the_copy_filter_notes_the_seed_of_the_try_that_was_kept(folder, tmp_path, pipeline):
    data = tmp_path / "train.npz"
    np.savez(data, images=captioned().images)
    where = made(folder, tmp_path / "samples", [f"copy-filter:train={data},threshold=1,tries=3"], batch_size=1)
    rows = rows_of(where)
    assert all(row["tries"] == 3 or not row["copy"] for row in rows)
    assert any(row["attempt"] for row in rows)
    again = [row["generator_seed"] for row in rows]
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"text": row["prompt"], "seed": seed} for row, seed in zip(rows, again, strict=True)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain = sample(folder, prompts=prompts, out=tmp_path / "plain", steps=2, batch_size=1)
    np.testing.assert_array_equal(pixels_in(plain), pixels_in(where))


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("prompt-optimization", "add target=NORM"),
        ("prompt-optimization:target=0", "must be above 0"),
        ("random-tokens:count=0", "at least 1"),
        ("attention:scale=0", "above 0"),
        ("attention:scale=nan", "not a finite number"),
        ("amg:strength=inf", "not a finite number"),
        ("embedding-noise:std=-1", "must not be negative"),
        ("amg", "add train=DATA"),
        ("copy-filter", "add train=DATA"),
    ],
)
def test_wrong_settings_are_named_with_the_way_out(folder, tmp_path, guard, message):
    with pytest.raises(InputError, match=message):
        made(folder, tmp_path / "samples", [guard])


def test_what_sdxl_can_not_have_is_refused_and_the_rest_works(tmp_path):
    tiny_stable_diffusion_xl(tmp_path / "tokenizer").save_pretrained(tmp_path / "xl")
    for guard in ("embedding-noise", "prompt-optimization:target=1"):
        with pytest.raises(InputError, match="one text encoder, not for a StableDiffusionXLPipeline"):
            made(tmp_path / "xl", tmp_path / "samples", [guard])
    before = pixels_in(made(tmp_path / "xl", tmp_path / "plain", []))
    for guard in ("repeat-words", "attention"):
        assert (pixels_in(made(tmp_path / "xl", tmp_path / guard, [guard])) != before).any()
