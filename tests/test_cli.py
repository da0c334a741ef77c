"""The command line, run in this process: help, wrong use, what each command says."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from launching import in_process
from toy import SETTINGS, toy_images
from unrote.cli import cli
from unrote.config import METHODS, Config, fields_of, load_config, preset_names

COMMANDS = ["train", "sample", "audit", "demo", "data", "config", "presets", "env"]
ASSIGNMENTS = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
SET = [part for assignment in ASSIGNMENTS for part in ("--set", assignment)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Nothing of these tests goes to the user's own cache."""
    old = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "UNROTE_CACHE": str(tmp_path_factory.mktemp("cache"))}
    yield
    os.environ.clear()
    os.environ.update(old)


@pytest.fixture
def here(monkeypatch, capsys):
    """Run ``unrote words…`` in this process, which saves the seconds that imports take: exit code, stdout, stderr."""

    def run(*words):
        code = in_process(words, monkeypatch)
        out, errors = capsys.readouterr()
        return code, out, errors

    return run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of PNG files."""
    folder = tmp_path_factory.mktemp("pictures")
    for index, pixels in enumerate(toy_images().images):
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return folder


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_train_as_json_twice_is_one_line_of_facts(here, pictures, tmp_path):
    words = ["train", "--data", pictures, "--out", tmp_path / "run", "--method", "agc", "--json", *SET]
    code, out, errors = here(*words)
    assert code == 0, errors
    facts = json.loads(out)
    assert (facts["samples_seen"], facts["steps"], facts["run"]) == (104, 13, str(tmp_path / "run"))
    code, again, errors = here(*words)
    assert (code, json.loads(again)) == (0, facts)
    assert "finished" in errors


def test_flags_are_settings(here, pictures, tmp_path):
    flags = ["--resolution", 4, "--limit", 9, "--epochs", 1, "--batch-size", 5, "--learning-rate", "1e-3", "--seed", 7]
    code, out, errors = here(
        "train", "--data", pictures, "--out", tmp_path / "run", "--method", "standard", "--dry-run", "--json", *flags
    )
    assert code == 0, errors
    config = Config.model_validate(json.loads(out)["config"])
    assert (config.data.resolution, config.data.limit, config.training.epochs) == (4, 9, 1)
    assert (config.training.batch_size, config.training.learning_rate, config.seed) == (5, 1e-3, 7)
    assert config.data.source == str(pictures)


# The plan.


def test_dry_run_prints_the_plan_and_writes_nothing(here, pictures, tmp_path):
    words = ["train", "--data", pictures, "--out", tmp_path / "deep" / "run", "--method", "iet-agc+", "--dry-run", *SET]
    code, out, errors = here(*words)
    assert code == 0, errors
    first = ["data", "model", "shards", "budget", "memory", "disk", "checkpoint"]
    assert [line.split()[0] for line in out.splitlines()][:7] == first
    assert "26 images of 8x8" in out
    assert "3 of 8 to 9 images; 2 rounds" in out
    assert "104 samples seen in 14 optimizer steps" in out, "two of the proxies end with a part of a batch"
    assert files_in(tmp_path) == []
    code, out, _ = here(*words, "--json")
    plan = json.loads(out)
    assert (plan["images"], plan["samples_seen"], plan["shard_sizes"]) == (26, 104, [9, 9, 8])
    assert plan["config"]["method"] == "iet-agc+"
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("method", ["standard", "iet-agc+"])
def test_the_plan_is_what_then_happens(here, pictures, tmp_path, method):
    words = ["train", "--data", pictures, "--out", tmp_path / "run", "--method", method, "--json", *SET]
    _, planned, _ = here(*words, "--dry-run")
    _, happened, errors = here(*words)
    planned, happened = json.loads(planned), json.loads(happened)
    assert (planned["samples_seen"], planned["steps"]) == (happened["samples_seen"], happened["steps"]), errors
    used = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert used < planned["disk_bytes"] + 300_000, "the estimate covers all that is large"


@pytest.mark.parametrize(
    ("preset", "method"),
    [*((name, "iet-agc+") for name in preset_names()), *(("tiny", name) for name in METHODS if name != "iet-agc+")],
)
def test_every_preset_is_planned_on_images_of_its_size(here, tmp_path, preset, method):
    side = load_config(preset=preset).data.resolution or 32
    data = tmp_path / "data.npz"
    random = np.random.default_rng(0)
    images, captions = random.integers(0, 256, (20, side, side, 3), dtype=np.uint8), [f"a {i}" for i in range(20)]
    np.savez(data, images=images, labels=np.arange(20) % 10, captions=captions)
    words = ["train", "--preset", preset, "--method", method, "--data", data, "--out", tmp_path / "run", "--dry-run"]
    code, out, errors = here(*words, "--json")
    assert code == 0, errors
    plan = json.loads(out)
    millions = {"cifar10": 35.7, "afhq64": 78.7}
    if preset in millions:
        assert plan["parameters"] / 1e6 == pytest.approx(millions[preset], abs=0.05), "what the papers say"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_goes_with_every_method(preset):
    assert {load_config(preset=preset, method=method).method for method in METHODS} == set(METHODS)


# Help.


@pytest.mark.parametrize("words", [["--help"], ["-h"], *([name, "--help"] for name in COMMANDS), ["data", "get", "-h"]])
def test_help_says_what_there_is(here, words):
    code, out, errors = here(*words)
    assert (code, errors) == (0, "")
    assert out.startswith("Usage: ")
    if len(words) == 1:
        assert all(f"\n  {name} " in out for name in COMMANDS)


def test_every_option_says_what_it_does():
    def options_of(command):
        for name, inner in getattr(command, "commands", {}).items():
            yield from ((f"{name} {option}", text) for option, text in options_of(inner))
        yield from ((p.name, p.help) for p in command.params if p.param_type_name == "option")

    assert all(text for _, text in options_of(cli))


def test_version(here):
    code, out, _ = here("--version")
    assert code == 0
    assert out.split()[-1].count(".") == 2


# Wrong use.


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], ["no command 'trian'", "did you mean 'train'?"]),
        (["data", "fetch"], ["no command 'fetch'", "list, get"]),
        (["config", "validat"], ["did you mean 'validate'?"]),
        (["train", "--out", "x", "--epoch", "3"], ["--epoch", "--epochs"]),
        (["train", "--out", "x", "--batchsize", "3"], ["--batchsize", "--batch-size"]),
        (["train"], ["--out"]),
        (["train", "--out", "x", "--epochs", "many"], ["--epochs", "many"]),
        (["train", "--out", "x", "--epochs", "0"], ["training.epochs", "greater than 0"]),
        (["train", "--out", "x", "--epochs", "inf"], ["training.epochs", "finite"]),
        (["train", "--out", "x", "--set", "gate.skip_rato=1"], ["gate.skip_rato", "did you mean 'gate.skip_ratio'?"]),
        (["train", "--out", "x", "--set", "gate.skip_ratio"], ["key=value"]),
        (["train", "--out", "x", "--set", "data.source=[a"], ["--set data.source=[a"]),
        (["train", "--out", "x", "--set", "method=agc"], ["--method"]),
        (["train", "--out", "x", "--method", "iet-agcc"], ["no method 'iet-agcc'", "did you mean 'iet-agc"]),
        (["train", "--out", "x", "--preset", "cifar"], ["no preset 'cifar'", "did you mean 'cifar10'?"]),
        (["train", "--out", "x", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "--out", "x", "--data", "nowhere/"], ["nowhere"]),
        (["train", "--out", "x", "--data", "emojy"], ["emojy", "did you mean"]),
        (["train", "--out", "x", "--set", "model.block_out_channels=[]"], ["model.block_out_channels"]),
        (["train", "--out", "x", "--set", "model.attention_levels=[1]", "--set", "model.attention_head_dim=48"],
         ["model.attention_head_dim", "divide"]),
        (["train", "--out", "x", "--set", "training.adam_beta1=1"], ["training.adam_beta1", "less than 1"]),
        (["train", "--out", "x", "--limit", "3", "--method", "iet"], ["ensemble.num_shards must", "3"]),
        (["train", "--out", ""], ["--out", "is empty"]),
        (["train", "--out", "x", "--data", ""], ['"" names no images']),
        (["train", "--out", "x", "--dry-run", "--device-memory", "-1"], ["--device-memory", "x>0"]),
        (["train", "--out", "x", "--set", "gate=3"], ["gate: is a section of settings"]),
        (["train", "--out", "x", "--set", "model.block_out_channels=32"], ["must be a list, such as [1, 2]"]),
        (["compare", "x", "--out", "y", "--num", "0"], ["--num", "x>=2"]),
        (["compare", "x", "--out", "y", "--steps", "0"], ["--steps", "x>=1"]),
        (["compare", "x", "--out", "y", "--threads", "0"], ["--threads", "x>=1"]),
        (["train", "--out", "x", "--resolution", "30"], ["data.resolution", "multiple of 4"]),
        (["train", "--out", "x", "--resolution", "16", "--limit", "9", "--device", "tpu"], ["--device tpu"]),
        (["sample", "nowhere"], ["nowhere", "no such folder"]),
        (["sample", "runs/deep/nowhere"], ["runs/deep/nowhere", "no such folder"]),
        (["sample"], ["RUN|PIPELINE"]),
        (["audit", "nowhere", "--train", "emoji"], ["nowhere"]),
        (["config", "validate", "nowhere.yaml"], ["nowhere.yaml"]),
        (["data", "get", "cifar11"], ["cifar11"]),
    ],
    ids=lambda value: " ".join(value),
)  # fmt: skip
def test_wrong_use_is_told_with_the_way_out(here, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, errors = here(*words)
    assert code == 2
    assert out == ""
    assert "Traceback" not in errors
    for part in said:
        assert part in errors
    assert files_in(tmp_path) == []


def test_a_folder_with_other_things_is_refused(here, pictures, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    code, _, errors = here("train", "--data", pictures, "--out", tmp_path, *SET)
    assert code == 2
    assert "not a run folder" in errors
    assert files_in(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("words", [["train", "--data"], ["scan"], ["audit", "--train", "emoji"], ["compare"]])
def test_a_file_in_place_of_a_folder_is_told_before_anything_is_read(here, tmp_path, words):
    (tmp_path / "thesis.tex").write_text("precious")
    code, _, errors = here(*words, "nowhere", "--out", tmp_path / "thesis.tex")
    assert code == 2
    assert "--out" in errors and "is a file" in errors


def test_an_audit_of_a_run_without_samples_says_how_to_make_them(here, tmp_path):
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    code, _, errors = here("audit", tmp_path, "--train", "emoji")
    assert code == 2
    assert f"run `unrote sample {tmp_path} --num 256` first" in errors


def test_images_of_a_run_that_are_not_found_from_here_are_said_to_be_the_runs(here, tmp_path):
    (tmp_path / "config.yaml").write_text(load_config(overrides={"data.source": "photos"}).to_yaml())
    code, _, errors = here("audit", "emoji", "--train", tmp_path)
    assert code == 2
    assert f"{tmp_path}: its training images, looked for from {Path.cwd()}: there is no photos" in errors


def test_a_folder_that_can_not_be_written_is_named(here, pictures):
    code, _, errors = here("train", "--data", pictures, "--out", "/proc/run", *SET)
    assert code == 2
    assert "/proc" in errors


# The other commands.


def test_config_show_is_what_config_takes(here, tmp_path):
    code, out, _ = here("config", "show", "--preset", "cifar10", "--method", "agc", "--set", "training.epochs=2e1")
    assert code == 0
    file = tmp_path / "run.yaml"
    file.write_text(out)
    expected = load_config(preset="cifar10", method="agc", overrides={"training.epochs": 20})
    assert load_config(file=file) == expected
    assert here("config", "validate", file)[:2] == (0, f"{file}: is valid\n")
    file.write_text(out.replace("skip_ratio", "skip_rate"))
    code, _, errors = here("config", "validate", file)
    assert code == 2
    assert str(file) in errors
    assert "did you mean 'gate.skip_ratio'?" in errors


def test_config_explain_explains_every_setting(here):
    code, out, _ = here("config", "explain")
    assert code == 0
    for name, _, _, description in fields_of():
        assert f"\n{name} = " in f"\n{out}"
        assert description.split(".")[0] in out


def test_presets_and_env_and_data_list(here):
    assert here("presets")[:2] == (0, "".join(f"{name}\n" for name in preset_names()))
    code, out, _ = here("env")
    assert code == 0
    for word in ("unrote", "Python", "torch", "diffusers", "CPU threads"):
        assert word in out
    code, out, _ = here("data", "list")
    assert code == 0
    assert "emoji" in out
    assert "cifar10" in out


def test_every_preset_file_is_yaml_that_stands_alone(tmp_path, here):
    folder = Path(__file__).parent.parent / "src" / "unrote" / "presets"
    for path in folder.glob("*.yaml"):
        assert yaml.safe_load(path.read_text())
        assert here("config", "validate", path)[0] == 0
