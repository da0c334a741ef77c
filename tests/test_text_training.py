"""Text-side mitigations in training: each does something, with every method, and nothing but the seed decides."""

import json
import os
import signal
import threading
import time

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from PIL import Image
from safetensors.torch import load_file

from forking import Command
from toy import assert_same_run, largest_difference, summary_of, toy_images
from unrote.api import train
from unrote.data.store import in_memory_store
from unrote.training.run import Run

pytestmark = pytest.mark.usefixtures("module_cache")

SETTINGS = {
    "model.train": "lora",
    "model.lora.rank": 2,
    "training.epochs": 2,
    "training.batch_size": 6,
    "training.learning_rate": 1e-3,
    "training.lr_warmup_steps": 0,
    "training.log_every_steps": 1,
    "training.checkpointing_steps": 100,
    "training.use_ema": False,
    "training.mixed_precision": "no",
    "text.dropout": 0.0,
    "ensemble.num_shards": 2,
    "ensemble.local_epochs": 1,
    "gate.skip_ratio": 0.9,
    "gate.bank.bins": 4,
}
EVERY = {
    "text.caption": "random", "text.dropout": 0.1, "text.replace_caption": 0.1, "text.replace_tokens": 0.2,
    "text.add_tokens": 1, "text.repeat_words": 0.3, "text.embedding_noise": 0.1,
}  # fmt: skip


def tuned(out, base, method="standard", **settings):
    images = in_memory_store(
        toy_images(12, side=16).images,
        source="toy",
        captions=["red cat", "a dog", "cat"] * 4,
        more_captions=[["a red cat", "cat"], [], ["a cat"]] * 4,
    )
    return train(images, out=out, method=method, settings=SETTINGS | {"model.pretrained": str(base)} | settings)


def weights(run):
    return load_file(run.model_folder / "pytorch_lora_weights.safetensors")


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    return tuned(tmp_path_factory.mktemp("plain") / "run", base)


@pytest.mark.parametrize("name", EVERY)
def test_each_setting_alone_changes_what_is_learned(base, plain, tmp_path, name):
    run = tuned(tmp_path / "run", base, **{name: "random" if name == "text.caption" else 1})
    assert largest_difference(weights(run), weights(plain)) > 1e-6
    assert summary_of(run)["samples_seen"] == summary_of(plain)["samples_seen"] == 24


def test_samples_that_the_text_steers_too_much_are_skipped(base, plain, tmp_path):
    none = tuned(tmp_path / "none", base, **{"text.max_prediction_norm": 1e-9})
    assert summary_of(none)["skipped"] == 24 and summary_of(plain)["skipped"] == 0
    every = tuned(tmp_path / "every", base, **{"text.max_prediction_norm": 1e9})
    assert largest_difference(weights(every), weights(plain)) == 0


def test_all_of_them_with_all_of_the_method_interrupted_or_not_give_the_same_run(base, tmp_path):
    settings = EVERY | {"text.max_prediction_norm": 1e9, "training.epochs": 6}
    whole = tuned(tmp_path / "whole", base, "iet-agc+", **settings)
    out = tmp_path / "interrupted"

    def interrupt():
        while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text().count("\n"):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(KeyboardInterrupt):
        tuned(out, base, "iet-agc+", **settings)
    watcher.join()
    assert_same_run(tuned(out, base, "iet-agc+", **settings), whole)


def test_the_command_killed_and_given_again_ends_as_undisturbed(base, tmp_path):
    """SIGKILL, which nothing can prepare for, with everything on; once in the middle, between two checkpoints."""
    (tmp_path / "pictures").mkdir()
    for index, pixels in enumerate(toy_images(12, side=16).images):
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text(["red cat", "a dog", "cat"][index % 3])
    settings = SETTINGS | EVERY | {"training.epochs": 12, "training.checkpointing_steps": 7, "data.resolution": 16}
    words = ["train", "--pretrained", base, "--data", tmp_path / "pictures", "--method", "iet-agc+"]
    words += [
        word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value).strip(chr(34))}")
    ]
    command = ["-m", "unrote", *words, "--out"]
    out = tmp_path / "killed"
    process, calm = Command([*command, out]), Command([*command, tmp_path / "whole"])
    while not list(out.glob("checkpoints/*.json")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.finish()
    assert list(out.glob("checkpoints/*.json")) and not Run(out).finished
    assert Command([*command, out]).finish().returncode == calm.finish().returncode == 0
    assert_same_run(Run(out), Run(tmp_path / "whole"))
