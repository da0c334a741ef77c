"""Looks at text-to-image models while they are fine-tuned: the images are those that `unrote sample` makes."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from PIL import Image

from test_text_to_image import CAPTIONS, captioned, tuned
from tiny_pipelines import tiny_flux, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_stable_diffusion_xl
from toy import assert_same_run, everything_of, toy_images
from unrote.data import in_memory_store
from unrote.errors import InputError
from unrote.guards.quick import QuickAudit
from unrote.sampling import sample
from unrote.text.generation import PromptDenoiser, reading_once
from unrote.text.prompts import Prompt
from unrote.training.monitor import Monitor

pytestmark = pytest.mark.usefixtures("module_cache")
LOOKS = {"monitor__every": 1, "monitor__samples": 6, "monitor__steps": 4, "monitor__max_overhead": 100.0}
LOOKS |= {"monitor__guidance_scale": 3.0}


def looks_of(run):
    records = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [record["monitor"] for record in records if "monitor" in record]


PIPELINES = {
    "sd": tiny_stable_diffusion,
    "xl": tiny_stable_diffusion_xl,
    "sd3": lambda folder: tiny_stable_diffusion_3(folder, t5=True),
    "flux": tiny_flux,
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_texts_are_read_once_and_the_images_are_the_same(tmp_path, kind):
    pipeline = PIPELINES[kind](tmp_path)
    denoise = PromptDenoiser(pipeline, [Prompt("red cat"), Prompt("a dog")], steps=2, guidance_scale=3.0, size=(16, 16))
    expected = [denoise(range(4)), denoise(range(4, 8))]
    reading_once(pipeline)
    assert (denoise(range(4)) == expected[0]).all() and (denoise(range(4, 8)) == expected[1]).all()
    read = []
    pipeline.text_encoder.register_forward_pre_hook(lambda *arguments: read.append(1))
    assert (denoise(range(4)) == expected[0]).all() and not read
    denoise(range(1, 5))
    assert read, "other texts are read"


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_looks_change_nothing_and_are_what_sampling_gives(tmp_path, base, kind, monkeypatch):
    alone = tuned(tmp_path / "alone", base, "iet-agc", kind)
    seen, whole = [], Monitor._sampled

    def watched(self):
        seen.append(whole(self))
        return seen[-1]

    monkeypatch.setattr(Monitor, "_sampled", watched)
    run = tuned(tmp_path / "watched", base, "iet-agc", kind, **LOOKS)
    for name, content in everything_of(alone).items():
        assert name == "log" or everything_of(run)[name] == content, name

    decisions = json.loads((run.path / "monitor.json").read_text())
    prompts = decisions["prompts"]
    assert len(prompts) == 6 and set(prompts) <= set(CAPTIONS) - {""}
    options = {"prompts": prompts, "steps": 4, "guidance_scale": 3.0}
    folder = sample(run, 6, out=tmp_path / "samples", **options)
    expected = np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])
    assert len(seen) == len(looks_of(run)) == 3
    assert np.abs(seen[-1].astype(int) - expected).max() <= (0 if kind == "full" else 1)
    assert (seen[0] != seen[-1]).any(), "training goes on"
    counts, _ = QuickAudit(captioned())(seen[-1], "mq", 0.5)
    assert looks_of(run)[-1]["mq@0.5"] == counts["measured"]["fraction"]


def test_adapters_on_rounded_weights_are_looked_at_as_they_are_trained(tmp_path, base):
    changed = {"training__mixed_precision": "bf16", "training__epochs": 1}
    alone = tuned(tmp_path / "alone", base, "standard", "lora", **changed)
    run = tuned(tmp_path / "watched", base, "standard", "lora", **changed, **LOOKS)
    for name, content in everything_of(alone).items():
        assert name == "log" or everything_of(run)[name] == content, name
    assert len(looks_of(run)) == 1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_fine_tuning_stops_and_finishes_with_the_best_also_when_it_was_interrupted(tmp_path, base, kind, monkeypatch):
    holdout = tmp_path / "holdout.npz"
    np.savez(holdout, images=toy_images(12, side=16, seed=5).images)
    settings = {**LOOKS, "monitor__stop_when": "mq@0.9 > 0.99", "monitor__keep_best": "pareto"}
    settings |= {"monitor__holdout": str(holdout), "training__checkpointing_steps": 2}
    expected = tuned(tmp_path / "undisturbed", base, "standard", kind, **settings)

    class Killed(BaseException):
        pass

    whole = Monitor.look

    def deadly(self, rounds, *arguments):
        whole(self, rounds, *arguments)
        if rounds == 2:
            raise Killed

    monkeypatch.setattr(Monitor, "look", deadly)
    with pytest.raises(Killed):
        tuned(tmp_path / "disturbed", base, "standard", kind, **settings)
    monkeypatch.undo()
    found = tuned(tmp_path / "disturbed", base, "standard", kind, **settings)
    assert_same_run(found, expected)
    decisions = json.loads((found.path / "monitor.json").read_text())
    looks = decisions["looks"]
    best = min(looks, key=lambda look: (max(0, look["monitor"]["mq@0.9"] - 0.99), look["monitor"]["frechet"]))
    assert decisions["model_samples"] == best["samples"]

    always = tuned(tmp_path / "stopped", base, "standard", kind, **LOOKS, monitor__stop_when="mq@1.0 > 0")
    assert json.loads((always.path / "monitor.json").read_text())["stopped"] and len(looks_of(always)) == 1


def test_images_without_captions_and_uneven_steps_are_refused_before_training(tmp_path, base):
    silent = in_memory_store(captioned().images, source="silent", captions=[""] * 18)
    with pytest.raises(InputError, match="no image of silent has a caption"):
        tuned(tmp_path / "silent", base, images=silent, **LOOKS)
    with pytest.raises(InputError, match=r"monitor\.steps: must divide the model's 1000 timesteps"):
        tuned(tmp_path / "uneven", base, **LOOKS | {"monitor__steps": 7})
