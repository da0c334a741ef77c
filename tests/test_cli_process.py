"""The command line as users run it: in its own process, from a folder of photos to a report, and every wrong turn."""

import csv
import json
import os
import subprocess
import sys
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from forking import Command
from unrote import __version__
from unrote.config import fields_of

TINY = [
    *("--set", "model.block_out_channels=[32, 32]", "--set", "training.mixed_precision=no"),
    *("--set", "training.lr_warmup_steps=2", "--epochs", "2", "--batch-size", "8"),
]

TWO = ["--method", "iet-agc+", "--set", "ensemble.num_shards=2", "--set", "ensemble.local_epochs=1"]

IN_ONE_PROCESS = """
import contextlib, io, json, logging, os, sys, traceback
from unrote.cli import main

def run(arguments):
    sys.argv = ["unrote", *arguments]
    logging.getLogger("unrote").handlers.clear()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
    return code, out.getvalue(), err.getvalue()

print(json.dumps([run(arguments) for arguments in json.loads(sys.argv[1])]))
"""
"""Torch takes seconds to import, so commands that need it and are quick share a process."""


class Result(NamedTuple):
    code: int
    out: str
    err: str


def start(arguments, cwd, **environment):
    own = {"OMP_NUM_THREADS": "1", "UNROTE_CACHE": str(cwd / "cache"), "UNROTE_DATA": str(cwd / "sets")}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | own | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return Result(process.returncode, out, err)


def unrote(cwd, *arguments):
    return finish(start(["-m", "unrote", *arguments], cwd))


def unrote_each(cwd, commands):
    """The result of each command, by its name; all in one process."""
    result = finish(start(["-c", IN_ONE_PROCESS, json.dumps(list(commands.values()))], cwd))
    assert result.code == 0, result.err
    return dict(zip(commands, (Result(*row) for row in json.loads(result.out)), strict=True))


def assert_refused(result, *words):
    assert result.code == 2, result
    assert "Traceback" not in result.err
    assert not result.out
    for word in words:
        assert word in result.err, (word, result.err)


def photos(folder, count, seed, size=(8, 8)):
    folder.mkdir()
    random = np.random.default_rng(seed)
    for index in range(count):
        ramp = np.linspace(0, 1, size[1])[:, None] * random.uniform(0, 200, (size[0], 1, 3))
        pixels = (ramp + random.uniform(0, 50, (*size, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder to work in, with images of several kinds."""
    path = tmp_path_factory.mktemp("home")
    photos(path / "photos", 20, 0)
    (path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of use")
    photos(path / "others", 12, 1)
    photos(path / "mixed", 2, 2)
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path / "mixed" / "bigger.png")
    photos(path / "one", 1, 3)
    photos(path / "wide", 4, 4, (8, 12))
    (path / "empty").mkdir()
    return path


@pytest.fixture(scope="module")
def demo(home):
    """The demo, which runs beside the other tests."""
    command = ["-m", "unrote", "demo", "--toy", "--out", "shown"]
    process = Command(command, cwd=home, UNROTE_CACHE=str(home / "cache"), UNROTE_DATA=str(home / "sets"))
    yield process
    process.kill()


@pytest.fixture(scope="module")
def trained(home, demo):
    return unrote(home, "train", "--data", "photos", "--out", "run", *TINY)


SMALL_AUDIT = ["--train", "photos", "--neighbors", "5", "--max-shift", "0"]


@pytest.fixture(scope="module")
def answers(home, trained):
    """What the commands after training say, by a name."""
    train = ["train", "--data", "photos", "--out"]
    commands = {
        "sample": ["sample", "run", "--num", "6", "--steps", "5", "--batch-size", "4"],
        "audit": ["audit", "run", "--train", "run", "--holdout", "others"],
        "again": [*train, "run", *TINY],
        "again, JSON": [*train, "run", *TINY, "--json"],
        "changed": [*train, "run", *TINY, "--seed", "3", "--learning-rate", "0.5"],
        "other data": ["train", "--data", "others", "--out", "run", *TINY],
        "dry": [*train, "dry", *TINY, *TWO, "--dry-run"],
        "dry, JSON": [*train, "dry", *TINY, *TWO, "--dry-run", "--json"],
        "foreign folder": [*train, "others", *TINY],
        "data": ["train", "--data", "emojy", "--out", "x"],
        "path": ["train", "--data", "photo", "--out", "x"],
        "split": ["train", "--data", "emoji:test", "--out", "x"],
        "absent": ["train", "--data", "cifar10", "--out", "x"],
        "no images": ["train", "--data", "empty", "--out", "x"],
        "several sizes": ["train", "--data", "mixed", "--out", "x"],
        "not square": ["train", "--data", "wide", "--out", "x"],
        "device": [*train, "x", *TINY, "--device", "warp"],
        "sample again": ["sample", "run", "--num", "6", "--steps", "5", "--batch-size", "4"],
        "sample otherwise": ["sample", "run", "--num", "6", "--steps", "10", "--batch-size", "4"],
        "sampler": ["sample", "run", "--num", "1", "--steps", "5", "--sampler", "ddmi", "--out", "x"],
        "no model": ["sample", "photos", "--num", "1", "--out", "x"],
        "no such model": ["sample", "./nothing/here", "--num", "1", "--out", "x"],
        "audit, JSON": ["audit", "run/samples", *SMALL_AUDIT, "--json", "--out", "json-report"],
        "audit one": ["audit", "one", *SMALL_AUDIT],
        "audit empty": ["audit", "empty", *SMALL_AUDIT],
        "audit empty train": ["audit", "one", "--train", "empty"],
        "audit nothing": ["audit", "nowhere", *SMALL_AUDIT],
        "audit mixed": ["audit", "mixed", *SMALL_AUDIT],
        "audit mixed at 8": ["audit", "mixed", *SMALL_AUDIT, "--resolution", "8"],
        "env": ["env"],
    }
    return unrote_each(home, commands)


# What loads nothing heavy.


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sample", "-h"], ["--version"]])
def test_help_loads_no_torch(home, arguments):
    probe = (
        f"import sys; sys.argv = ['unrote', *{arguments}]\nimport runpy\n"
        "try: runpy.run_module('unrote', run_name='__main__')\n"
        "finally: print('LOADED', *sys.modules)"
    )
    result = finish(start(["-c", probe], home))
    assert result.code == 0, result.err
    text, _, loaded = result.out.rpartition("LOADED")
    assert ("Usage: " in text) or (__version__ in text)
    assert not {"torch", "diffusers", "numpy", "PIL"} & set(loaded.split())


def test_help_names_every_command(home):
    text = unrote(home, "--help").out
    for name in ("train", "sample", "audit", "demo", "data", "config", "presets", "env"):
        assert f"\n  {name} " in text


def test_the_console_script_is_the_same_program(home):
    script = Path(sys.executable).with_name("unrote")
    result = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert (result.returncode, __version__ in result.stdout) == (0, True)


# Wrong use: exit code 2, what is wrong, and the nearest right thing.


WRONG = [
    (["trian"], ["'trian'", "did you mean 'train'"]),
    (["config", "shwo"], ["'shwo'", "did you mean 'show'"]),
    (["data", "lst"], ["'lst'", "did you mean 'list'"]),
    (["train", "--out", "x", "--epoch", "3"], ["--epoch", "--epochs"]),
    (["train"], ["--out"]),
    (["train", "--out", "x", "--epochs", "many"], ["--epochs", "many"]),
    (["sample"], ["RUN|PIPELINE"]),
    (["audit", "x"], ["--train"]),
    (["config", "show", "--set", "gate.skip_ration=1"], ["gate.skip_ration", "did you mean 'gate.skip_ratio'"]),
    (["config", "show", "--set", "gate.skip_ratio"], ["--set gate.skip_ratio", "key=value"]),
    (["config", "show", "--set", "gate.skip_ratio=-1"], ["gate.skip_ratio", "greater than 0", "-1"]),
    (["config", "show", "--set", "method=agc"], ["--method"]),
    (["config", "show", "--method", "iet-acg"], ["'iet-acg'", "did you mean 'iet-agc'", "standard"]),
    (["config", "show", "--preset", "cifar"], ["'cifar'", "did you mean 'cifar10'", "unrote presets"]),
    (["config", "show", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
    (["config", "validate", "wrong.yaml"], ["wrong.yaml", "training.epoch", "did you mean 'training.epochs'"]),
    (["config", "validate", "list.yaml"], ["list.yaml", "mapping"]),
    (["config", "validate", "broken.yaml"], ["broken.yaml", "YAML"]),
    (["data", "get", "cifar"], ["cifar10"]),
]


@pytest.fixture(scope="module")
def wrong(home):
    """What each of :data:`WRONG` says; all in one process."""
    (home / "wrong.yaml").write_text("training: {epoch: 3}\n")
    (home / "list.yaml").write_text("- 1\n")
    (home / "broken.yaml").write_text("a: [1\n")
    return unrote_each(home, {" ".join(arguments): arguments for arguments, _ in WRONG})


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=" ".join)
def test_wrong_use(home, wrong, arguments, words):
    assert_refused(wrong[" ".join(arguments)], *words)
    assert not (home / "x").exists()


def test_wrong_use_in_a_process_of_its_own(home):
    assert_refused(unrote(home, "trian"), "'trian'", "did you mean 'train'")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data", ["emojy", "did you mean", "emoji"]),
        ("path", ["photo", "did you mean", "photos"]),
        ("split", ["emoji", "'test'", "train, holdout"]),
        ("absent", ["cifar10", "unrote data get cifar10"]),
        ("no images", ["empty", "no images"]),
        ("several sizes", ["mixed", "--resolution"]),
        ("not square", ["8x12", "--resolution"]),
        ("device", ["--device warp"]),
        ("foreign folder", ["others", "not a run folder"]),
        ("sample otherwise", ["steps: 5 -> 10"]),
        ("sampler", ["ddmi", "ddim, ddpm and dpm-solver++"]),
        ("no model", ["photos", "neither a run folder nor a diffusers pipeline"]),
        ("no such model", ["nothing/here"]),
        ("audit empty", ["empty", "no images"]),
        ("audit empty train", ["empty", "no images"]),
        ("audit nothing", ["nowhere"]),
        ("audit mixed", ["mixed", "differ in size", "--resolution"]),
    ],
)
def test_unusable_input(home, answers, name, words):
    assert_refused(answers[name], *words)
    assert not (home / "x").exists()


# The whole way.


def test_train_makes_a_run(home, trained):
    assert trained.code == 0, trained.err
    assert "1 quarantined" in trained.err
    assert "next: unrote sample run" in trained.out
    (line,) = (home / "run" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "broken.png" and json.loads(line)["reason"]
    summary = json.loads((home / "run" / "run.json").read_text())
    assert summary["samples_seen"] == 2 * 20
    assert "40 samples seen" in trained.out
    with (home / "run" / "ledger.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == [f"{index:02d}.png" for index in range(20)]


def test_sample_makes_images(home, answers):
    sampled = answers["sample"]
    assert sampled.code == 0, sampled.err
    assert "next: unrote audit run/samples --train run" in sampled.out
    assert len(list((home / "run" / "samples").glob("*.png"))) == 6
    assert Image.open(home / "run" / "samples" / "000005.png").size == (8, 8)


def test_audit_makes_a_report(home, answers):
    audited = answers["audit"]
    assert audited.code == 0, audited.err
    report = home / "run-report"
    assert audited.out.rstrip().endswith("run-report/report.html")
    assert names_in(report) == ["pairs.csv", "report.html", "report.json", "summary.md"]
    summary = json.loads((report / "report.json").read_text())
    assert summary["counts"] == {**summary["counts"], "generated": 6, "train": 20, "holdout": 12}
    assert summary["verdict"]["title"] in audited.out
    assert "<html" in (report / "report.html").read_text()


def test_audit_prints_json_and_nothing_else(home, answers):
    result = answers["audit, JSON"]
    assert result.code == 0, result.err
    assert json.loads(result.out) == json.loads((home / "json-report" / "report.json").read_text())


def test_the_same_command_again_says_that_it_is_finished(home, answers):
    assert answers["again"].code == 0
    assert "run is finished; nothing to do" in answers["again"].err
    printed = json.loads(answers["again, JSON"].out)
    assert printed == json.loads((home / "run" / "run.json").read_text()) | {"run": "run"}
    assert answers["sample again"].code == 0


def test_a_changed_configuration_is_refused_by_key(answers):
    assert_refused(answers["changed"], "seed: 0 -> 3", "training.learning_rate: 0.001 -> 0.5", "another --out")
    assert_refused(answers["other data"], "data.source: photos -> others")


def test_a_dry_run_prints_the_plan_and_writes_nothing(home, answers):
    result = answers["dry"]
    assert result.code == 0, result.err
    for word in ("20 images of 8x8", "1 quarantined", "2 of 10 images", "40 samples seen", "parameters", "free"):
        assert word in result.out
    planned = json.loads(answers["dry, JSON"].out)
    assert (planned["images"], planned["samples_seen"], planned["rounds"]) == (20, 40, 2)
    assert planned["config"]["training"]["batch_size"] == 8
    assert not (home / "dry").exists()


def test_one_image_can_be_audited(home, answers):
    assert answers["audit one"].code == 0, answers["audit one"].err
    summary = json.loads((home / "one-report" / "report.json").read_text())
    assert summary["counts"]["generated"] == 1
    assert answers["audit mixed at 8"].code == 0, answers["audit mixed at 8"].err


def test_the_model_needs_nothing_of_ours(home, trained):
    """A diffusers pipeline that anybody can load: this process can't import the package at all."""
    code = """
import sys
sys.modules["unrote"] = None
from diffusers import DDPMPipeline
pipeline = DDPMPipeline.from_pretrained("run/model")
pipeline.set_progress_bar_config(disable=True)
image = pipeline(batch_size=1, num_inference_steps=3).images[0]
raw = DDPMPipeline.from_pretrained("run/model", variant="raw")
assert not [name for name in sys.modules if name.startswith("unrote.")]
print(image.size, image.mode)
"""
    result = finish(start(["-c", code], home, HF_HUB_OFFLINE="1"))
    assert result.code == 0, result.err
    assert result.out.split("\n")[0] == "(8, 8) RGB"


def test_demo(home, demo, answers):
    result = demo.finish(300)
    assert result.returncode == 0, result.stderr
    page = home / "shown" / "report.html"
    assert "The evidence: shown/report.html" in result.stdout
    assert "of the samples of ordinary training are near-copies" in result.stdout
    text = page.read_text()
    assert "iet-agc+" in text and "standard" in text
    assert names_in(home / "shown" / "standard" / "model")


# Settings, sets, machine.


def test_config_show_prints_what_config_takes(home):
    shown = unrote(home, "config", "show", "--preset", "demo", "--method", "agc", "--set", "gate.skip_ratio=0.7")
    assert shown.code == 0, shown.err
    values = yaml.safe_load(shown.out)
    assert (values["method"], values["gate"]["skip_ratio"], values["ensemble"]["enabled"]) == ("agc", 0.7, False)
    (home / "shown.yaml").write_text(shown.out)
    valid = unrote(home, "config", "validate", "shown.yaml")
    assert (valid.code, valid.out) == (0, "shown.yaml: is valid\n")
    assert unrote(home, "config", "show", "--config", "shown.yaml").out == shown.out


def test_a_setting_that_does_nothing_is_said(home):
    result = unrote(home, "config", "show", "--method", "standard", "--set", "gate.skip_ratio=0.7")
    assert result.code == 0
    assert "warning: gate.skip_ratio is ignored" in result.err
    assert yaml.safe_load(result.out)["method"] == "standard"


def test_config_explain_has_every_setting_with_its_meaning(home):
    result = unrote(home, "config", "explain")
    assert result.code == 0
    lines = result.out.splitlines()
    for name, _, _, description in fields_of():
        (at,) = [index for index, line in enumerate(lines) if line.startswith(f"{name} = ")]
        assert lines[at + 1].strip() == " ".join(description.split()) != ""


def test_presets_are_the_files_in_the_package(home):
    result = unrote(home, "presets")
    files = (resources.files("unrote") / "presets").iterdir()
    assert result.out.split() == sorted(Path(entry.name).stem for entry in files if entry.name.endswith(".yaml"))


def test_env_has_what_a_bug_report_needs(answers):
    result = answers["env"]
    assert result.code == 0
    for word in (f"unrote {__version__}", "Python 3", "torch ", "diffusers ", "CPU threads", "accelerators: "):
        assert word in result.out
    for package in ("transformers", "peft", "accelerate", "datasets", "onnxruntime"):
        there = find_spec(package) is not None
        assert f"\n{package} {metadata.version(package) if there else 'not installed'}\n" in result.out


def test_data_list_says_what_is_here(home):
    result = unrote(home, "data", "list")
    assert result.code == 0, result.err
    assert "part of unrote" in result.out
    assert "not here: unrote data get cifar10" in result.out
    for name in ("emoji", "cifar10", "cifar100", "afhq-dog", "laion-10k"):
        assert f"\n{name} " in f"\n{result.out}"
