"""Guards and the re-test on flow matching models: each works, or is refused with the way out."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("transformers")

from tiny_pipelines import tiny_flux, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_stable_diffusion_xl
from toy import toy_images
from unrote.api import train
from unrote.data import in_memory_store
from unrote.detection.retest import Settings, retest
from unrote.errors import InputError
from unrote.guards.callback import GuardCallback
from unrote.guards.spec import GUARDS
from unrote.sampling import sample, text_sampler
from unrote.seeding import derive_seed
from unrote.text.generation import PromptDenoiser, load_text_to_image
from unrote.text.prompts import Prompt

FEW = {"steps": 2, "batch_size": 2, "resolution": 16, "prompts": ["red cat", "a dog", "a red dog"]}
FLOW = ["StableDiffusion3Pipeline", "FluxPipeline"]
WORKING = ["copy-filter", "random-tokens", "repeat-words"]
REFUSED = {
    "amg": "is for models with a UNet",
    "attention": "is for models with a UNet",
    "embedding-noise": "is for pipelines with one text encoder",
    "prompt-optimization:target=1": "is for pipelines with one text encoder",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    flux = tiny_flux(folder / "tokenizer", vae_levels=1)  # which makes 128 latents a side by itself
    for pipeline in (tiny_stable_diffusion_3(folder / "tokenizer"), flux):
        pipeline.save_pretrained(folder / type(pipeline).__name__)
    return folder


def pixels_in(where):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(where.glob("*.png"))])


def rows_of(where):
    return [json.loads(line) for line in (where / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", FLOW)
def test_every_guard_works_or_is_refused_with_those_that_do(folders, tmp_path, family):
    source = folders / family
    assert {name.partition(":")[0] for name in [*WORKING, *REFUSED]} == set(GUARDS)
    plain = sample(source, out=tmp_path / "plain", **FEW)
    made = pixels_in(plain)
    data = tmp_path / "train.npz"
    others = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3)).astype(np.uint8)
    np.savez(data, images=np.concatenate([made[:1], others]))
    for guard in ("random-tokens:count=2", "repeat-words"):
        where = sample(source, out=tmp_path / guard.partition(":")[0], guards=[guard], **FEW)
        assert (pixels_in(where) != made).any()
        assert all(len(row["guarded_prompt"].split()) > len(row["prompt"].split()) for row in rows_of(where))
    filtered = sample(source, out=tmp_path / "filter", guards=[f"copy-filter:train={data},threshold=0.05"], **FEW)
    first = rows_of(filtered)[0]
    assert first["tries"] > 1 and (first["attempt"] > 0 or first["copy"]), "the planted copy is seen"
    for guard, why in REFUSED.items():
        with pytest.raises(InputError, match=f"{why}, not for a {family}; it takes {', '.join(WORKING[:2])} and"):
            sample(source, out=tmp_path / "refused", guards=[guard], **FEW)
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("family", FLOW)
def test_as_a_callback_there_is_nothing_to_hook_guards_into(folders, family):
    pipeline = load_text_to_image(folders / family, None, None)
    with pytest.raises(InputError, match=rf"a {family} has no UNet.*put CopyFilter around it"):
        GuardCallback(pipeline, ["repeat-words"], ["red cat"], [0])


@pytest.mark.parametrize(("family", "own"), [("StableDiffusion3Pipeline", 16), ("FluxPipeline", 128)])
def test_the_shape_is_what_is_made(folders, family, own):
    pipeline = load_text_to_image(folders / family, None, None)
    _, pipeline.scheduler = text_sampler(pipeline.scheduler, None, 1)
    for size in (None, (8, 24)):
        denoise = PromptDenoiser(pipeline, [Prompt("cat")], steps=1, size=size)
        assert denoise.shape == (*(size or (own, own)), 3) == denoise([0])[0].shape


@pytest.mark.parametrize(("family", "multiple"), [("StableDiffusion3Pipeline", 4), ("FluxPipeline", 2), ("base", 8)])
def test_a_size_that_can_not_be_made_is_refused(folders, base, tmp_path, family, multiple):
    source = base if family == "base" else folders / family
    for wrong in (17, 0):
        with pytest.raises(InputError, match=rf"--resolution: {wrong}x{wrong} are no multiples of {multiple}"):
            sample(source, out=tmp_path / "s", **(FEW | {"resolution": wrong}))


def planted(source):
    """Training images, of which the first is the second sample of a re-test by its caption."""
    pipeline = load_text_to_image(source, None, None)
    _, pipeline.scheduler = text_sampler(pipeline.scheduler, None, 2)
    denoise = PromptDenoiser(pipeline, [Prompt("red cat")], seed=derive_seed(0, "retest"), steps=2)
    made = denoise(range(2))[1]
    others = np.random.default_rng(0).integers(0, 255, (2, *made.shape)).astype(np.uint8)
    return in_memory_store(np.stack([made, *others]), source="planted", captions=["red cat", "a dog", "cat"])


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    tiny_stable_diffusion_xl(folder / "tokenizer").save_pretrained(folder / "xl")
    return folder / "xl"


@pytest.mark.parametrize("family", [*FLOW, "xl"])
def test_with_several_text_encoders_all_tries_are_of_the_caption(folders, xl, family):
    """Found in the second half of the tries, where one encoder's embedding would have noise."""
    source = xl if family == "xl" else folders / family
    settings = Settings(tries=2, steps=2, batch_size=2, threshold=0.01)
    store = planted(source)
    guards = ["copy-filter:tries=1"] if family == FLOW[0] else []
    assert retest(source, [0], store, settings=settings, guards=guards)["images"][0]["found_after"] == 2
    with pytest.raises(InputError, match="one text encoder"):
        retest(source, [0], store, settings=settings, guards=["embedding-noise"])


def test_a_run_is_searched_at_the_size_that_it_was_trained_at(tmp_path, monkeypatch):
    """Twice the pipeline's own size: its images would be compared with none."""
    monkeypatch.setenv("UNROTE_CACHE", str(tmp_path / "cache"))
    tiny_stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd")
    images = in_memory_store(toy_images(4, side=16).images, source="toy", captions=["red cat", "a dog"] * 2)
    np.savez(tmp_path / "toy.npz", images=images.images, captions=np.array(images.captions))
    settings = {"model.pretrained": str(tmp_path / "sd"), "training.epochs": 1, "training.batch_size": 4}
    settings |= {"training.mixed_precision": "no", "training.lr_warmup_steps": 0, "model.train": "full"}
    run = train(tmp_path / "toy.npz", out=tmp_path / "run", method="standard", settings=settings)
    few = Settings(tries=2, steps=2, batch_size=2)
    assert [row["tries"] for row in retest(run, [0, 3], settings=few)["images"]] == [2, 2]
