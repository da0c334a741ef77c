"""Anti-memorization guidance: fewer copies, nothing touched where nothing is too like, one image apart from others."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from memorizing import COUNT, pictures
from unrote.errors import InputError
from unrote.guards.guidance import AntiMemorizationGuidance, _Step
from unrote.guards.index import PixelIndex, is_copy
from unrote.sampling import sample

FEW = {"steps": 10, "batch_size": 16}


def references(count=COUNT):
    return torch.from_numpy(pictures(count).images).permute(0, 3, 1, 2).float() / 127.5 - 1


def images_in(folder):
    from unrote.data import open_images

    return np.asarray(open_images(folder, resolution=None).images)


@pytest.fixture(scope="module")
def plain(memorizing, tmp_path_factory):
    return images_in(sample(memorizing, 48, out=tmp_path_factory.mktemp("plain") / "samples", **FEW))


def test_it_lowers_the_share_of_copies(memorizing, plain, tmp_path):
    folder = sample(memorizing, 48, out=tmp_path / "guided", guards=["amg:strength=0.5"], **FEW)
    index = PixelIndex(pictures(COUNT))
    before, after = (is_copy(index, index(images)[0]).mean() for images in (plain, images_in(folder)))
    assert before > 0.25
    assert after < 0.7 * before
    assert json.loads((folder / "sampling.json").read_text())["guards"][0]["strength"] == 0.5


def test_where_nothing_is_too_like_nothing_changes(memorizing, plain, tmp_path):
    folder = sample(memorizing, 48, out=tmp_path / "guided", guards=["amg:threshold=0.001"], **FEW)
    np.testing.assert_array_equal(images_in(folder), plain)


def test_an_image_is_guided_apart_from_its_batch(memorizing, tmp_path):
    parts = [
        images_in(sample(memorizing, 8, out=tmp_path / str(size), guards=["amg"], steps=10, batch_size=size))
        for size in (1, 8)
    ]
    assert np.abs(parts[0].astype(int) - parts[1].astype(int)).max() <= 1


def test_a_plain_pipeline_is_guided_in_the_block_alone(memorizing):
    pipeline = DDPMPipeline.from_pretrained(memorizing.model_folder)
    pipeline.set_progress_bar_config(disable=True)

    def made():
        noises = [torch.Generator().manual_seed(i) for i in range(8)]
        return pipeline(8, generator=noises, num_inference_steps=20, output_type="np").images

    before = made()
    with AntiMemorizationGuidance(references()).on(pipeline):
        inside = made()
    assert (inside != before).any()
    np.testing.assert_array_equal(made(), before)


class Towards(torch.nn.Module):
    """Predicts a step from x towards what it is given: a smooth function with a gradient that can be written down."""

    def __init__(self, target, kind):
        super().__init__()
        self.target, self.kind = target, kind

    def forward(self, sample, timestep, return_dict=False):
        return (0.5 * sample + 0.1 * self.target,)


def scheduler(kind):
    return DDPMScheduler(prediction_type=kind)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_change_is_along_the_gradient_of_the_similarity(kind):
    """Against numerical differentiation, in float64, whatever the model predicts."""
    refs = references().double()
    schedule = scheduler(kind)
    time = torch.tensor(300)
    alpha = float(schedule.alphas_cumprod[300])
    signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
    unet = Towards(refs[:2].flip(0), kind).double()
    x = 0.8 * refs[:2] + 0.1 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()

    def clean_of(x, prediction):
        if kind == "sample":
            return prediction
        return (x - sigma * prediction) / signal if kind == "epsilon" else signal * x - sigma * prediction

    def similarity(x):
        clean = clean_of(x, unet(x, time)[0])
        distances = torch.cdist(clean.flatten(1), refs.flatten(1)).sort(1).values
        return 1 - distances[:, 0] / distances.mean(1)

    guard = AntiMemorizationGuidance(refs, threshold=1.0, strength=0.2, clip=False)
    before = unet(x, time)[0]
    handle = guard.attach(unet, schedule)
    after = unet(x, time)[0]
    handle.remove()
    step = 1e-5
    gradient = torch.zeros_like(x)
    for place in np.ndindex(3, 8, 8):
        moved = x.clone()
        moved[(slice(None), *place)] += step
        gradient[(slice(None), *place)] = (similarity(moved) - similarity(x)) / step
    unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def noise_of(prediction):
        return (x - signal * clean_of(x, prediction)) / sigma

    size = noise_of(before).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(noise_of(after) - noise_of(before), 0.2 * sigma * size * unit, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_change_is_the_same_but_for_rounding(half):
    refs = references()
    x = 0.8 * refs[:2] + 0.1 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    changes = []
    for dtype in (torch.float32, half):
        unet, time = Towards(refs[:2].flip(0).to(dtype), "epsilon"), torch.tensor(300)
        before = unet(x.to(dtype), time)[0]
        handle = AntiMemorizationGuidance(refs, threshold=1.0, strength=0.2).attach(unet, scheduler("epsilon"))
        after = unet(x.to(dtype), time)[0]
        handle.remove()
        assert after.dtype == dtype
        changes.append((after - before).float())
    assert changes[0].norm() > 0.5
    assert (changes[1] - changes[0]).norm() < 0.1 * changes[0].norm()


def test_the_schedule_is_a_parabola():
    refs = references()
    half = refs[:1] + 0.2 * (refs[1:2] - refs[:1])
    unet, schedule = Towards(half, "sample"), scheduler("sample")
    unet.forward = lambda sample, timestep, return_dict=False: (half + 0.001 * sample,)
    guard = AntiMemorizationGuidance(refs, threshold=0.5, clip=False)
    ratio = float(guard.ratio(half)[0])
    assert ratio < 0.5
    last = int(1000 * (1 - ratio / 0.5) ** 0.5)
    guard.attach(unet, schedule)
    for time, guided in ((last - 2, True), (last + 2, False)):
        out = unet(torch.zeros_like(half), torch.tensor(time))[0]
        assert (out != half).any() == guided


def test_the_ratio_is_that_of_the_audit():
    index = PixelIndex(pictures(60), flip=False, max_shift=0)
    index.views = index.views[:1]
    images = pictures(10, seed=3).images
    expected, nearest = index.ratios(images)
    found, rows = AntiMemorizationGuidance(references(60)).ratio(
        torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    )
    np.testing.assert_allclose(found.numpy(), expected["l2"], rtol=1e-5)
    np.testing.assert_array_equal(rows.numpy(), nearest)


class Guided(torch.nn.Module):
    """Three given predictions: without text, with text, and with another text."""

    def __init__(self, free, steered, other):
        super().__init__()
        self.free, self.steered, self.other = free, steered, other

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=False):
        kinds = {0.0: self.free, 1.0: self.steered, 2.0: self.other}
        return (torch.stack([kinds[float(text[0, 0])] for text in encoder_hidden_states]),)


@pytest.mark.parametrize(("despecify", "deduplicate"), [(0.0, 0.0), (2.0, 0.0), (100.0, 1.0), (2.0, 3.0), (2.0, 100.0)])
def test_despecification_and_deduplication_follow_the_papers_equations(despecify, deduplicate):
    refs = references()
    alpha = float(scheduler("sample").alphas_cumprod[100])
    free, steered, other = refs[3], refs[0], refs[7]
    unet, scale = Guided(free, steered, other), 4.0
    guard = AntiMemorizationGuidance(
        refs,
        threshold=1.0,
        strength=0.0,
        despecify=despecify,
        deduplicate=deduplicate,
        embed=lambda rows: {"encoder_hidden_states": torch.full((len(rows), 1, 1), 2.0)},
        clip=False,
    )
    guard.attach(unet, scheduler("sample"), lambda: scale)
    text = torch.tensor([0.0, 1.0]).view(2, 1, 1)
    out = unet(torch.zeros(2, 3, 8, 8), torch.tensor(100), encoder_hidden_states=text)[0]
    found = out[0] + scale * (out[1] - out[0])
    combined = free + scale * (steered - free)
    similarity = 1 - float(guard.ratio(combined[None])[0])
    s1 = max(min(despecify * similarity, scale - 1), 0)
    s2 = max(min(deduplicate * similarity, scale - s1 - 1), 0)
    torch.testing.assert_close(found, combined - s1 * (steered - free) - s2 * (other - free), rtol=1e-4, atol=1e-4)
    assert alpha > 0.5


def test_numbers_out_of_range_are_refused():
    for wrong in ({"threshold": 0.0}, {"threshold": 1.5}, {"strength": -1.0}, {"deduplicate": 1.0}):
        with pytest.raises(InputError, match="amg: "):
            AntiMemorizationGuidance(references(), **wrong)
    with pytest.raises(InputError, match="two different training images"):
        AntiMemorizationGuidance(references()[:1])


def test_a_model_without_text_has_no_guard_of_the_text(memorizing, tmp_path):
    for guard in ("random-tokens", "repeat-words", "embedding-noise", "prompt-optimization:target=1", "attention"):
        with pytest.raises(InputError, match="is for text-to-image models"):
            sample(memorizing, 2, out=tmp_path / "samples", guards=[guard], **FEW)
    with pytest.raises(InputError, match="are for text-to-image models"):
        sample(memorizing, 2, out=tmp_path / "samples", guards=["amg:despecify=1"], **FEW)


def test_a_step_of_a_part_is_a_part_of_the_step():
    refs = references()
    unet = Guided(refs[0], refs[1], refs[2])
    text = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]).view(6, 1, 1)
    x, prediction = torch.randn(6, 3, 8, 8), torch.randn(6, 3, 8, 8)
    kwargs = {"encoder_hidden_states": text, "return_dict": False, "added_cond_kwargs": {"ids": torch.arange(6)}}
    step = _Step(unet, (x, torch.tensor(7)), kwargs, prediction, scheduler("epsilon"), 3.0)
    part = step.at(torch.tensor([2, 0]))
    torch.testing.assert_close(part.combined, step.combined[[2, 0]])
    assert part.rest["added_cond_kwargs"]["ids"].tolist() == [2, 0, 5, 3]
    assert part.rest["encoder_hidden_states"].flatten().tolist() == [0, 0, 1, 1]
