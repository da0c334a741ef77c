"""Studies: what is compared, that it is computed once, and that its numbers are those of the audit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from toy import toy_images, toy_run
from unrote.auditing import audit
from unrote.auditing.searching import References
from unrote.cli import cli
from unrote.data.store import digests_of, in_memory_store, same_pixels
from unrote.encoders.random_conv import RandomConvEncoder
from unrote.errors import InputError
from unrote.sampling import sample
from unrote.study import classifier, measure
from unrote.study.cells import claimed
from unrote.study.measure import Yardstick
from unrote.study.plan import ImagesPlan, RepeatsPlan, load_study
from unrote.study.results import compare
from unrote.study.run import Ground, Wanted
from unrote.study.subjects import Subjects, choose_subjects, encoder_images
from unrote.training.run import Run

STUDIES = Path(__file__).parents[1] / "benchmarks" / "study"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, module_cache):
    """400 different smooth pictures with labels, as a file."""
    store = toy_images(400, classes=4, seed=5)
    path = tmp_path_factory.mktemp("pictures") / "pictures.npz"
    np.savez(path, images=store.images, labels=store.labels)
    return str(path)


def study_file(folder, source, **changes):
    """A study of seconds; ``changes`` are top-level keys."""
    study = {
        "name": "a <study>",
        "seeds": [0, 1],
        "regimes": {
            "few": {
                "images": {"source": source, "resolution": 8, "train": 20, "reference": 40},
                "samples_seen": 96,
                "snapshots": 2,
                "sampling": {"num": 12, "steps": 2, "batch_size": 12},
                "settings": {"model.block_out_channels": [32], "training.batch_size": 8},
            }
        },
        "methods": {"standard": {}, "agc": {"method": "agc", "settings": {"gate.skip_ratio": 0.9}}},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def done(pictures, tmp_path_factory):
    """A computed study: its file, its folder, its result."""
    folder = tmp_path_factory.mktemp("study")
    file = study_file(folder, pictures)
    return file, folder / "out", compare([file], folder / "out", device=CPU)


def test_a_study_is_computed_once(done):
    file, out, result = done
    assert result["missing"] == []
    assert {(cell["method"], cell["seed"]) for cell in result["cells"]} == {
        (method, seed) for method in ("standard", "agc") for seed in (0, 1)
    }
    for cell in result["cells"]:
        assert cell["samples_seen"] == 96
        assert [point["samples_seen"] for point in cell["points"]] == cell["snapshots"]
        assert len(cell["snapshots"]) == 2
        assert cell["cpu_seconds"] > 0
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.*")}
    assert not list((out / "cells").glob("*/run"))
    assert compare([file], out, device=CPU) == result
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*.*")} == before


def test_another_measure_trains_nothing_again(done, monkeypatch):
    file, out, result = done
    trained = {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*/trained.json")}
    monkeypatch.setattr(measure, "VERSION", measure.VERSION + 1)
    again = compare([file], out, device=CPU, only=["few/agc/1"])
    assert again["missing"] == ["few/standard/0", "few/agc/0", "few/standard/1"]
    assert [cell["points"] for cell in again["cells"]] == [
        cell["points"] for cell in result["cells"] if (cell["method"], cell["seed"]) == ("agc", 1)
    ]
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").glob("*/trained.json")} == trained
    monkeypatch.undo()
    compare([file], out, device=CPU)


def test_what_is_written_says_the_same(done):
    _, out, result = done
    written = json.loads((out / "study.json").read_text())
    assert written == json.loads(json.dumps(result))
    row = written["summary"]["few"]["spaces"]["random-conv"]["near-copies"]["standard"]
    assert row["at_equal_quality_ratio"]["value"] == 1.0
    page, table = (out / "study.html").read_text(), (out / "study.md").read_text()
    assert "a &lt;study&gt;" in page and "<study>" not in page
    assert "<script" not in page and not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == 4
    assert len([line for line in table.splitlines() if line.startswith("| agc |")]) == 1


def test_a_cell_another_process_is_at_is_left_alone(pictures, tmp_path):
    study = load_study(study_file(tmp_path, pictures, seeds=[3], methods={"standard": {}}))
    cell = Ground(study, "few", 3, tmp_path / "out").cell("standard")
    with claimed(cell.folder) as ours:
        assert ours
        result = compare([tmp_path / "study.yaml"], tmp_path / "out", device=CPU)
    assert result["missing"] == ["few/standard/3"]
    assert cell.folder.trained is None


def test_an_interrupted_cell_goes_on(pictures, tmp_path, monkeypatch):
    file = study_file(tmp_path, pictures, seeds=[0], methods={"standard": {}})
    whole = compare([file], tmp_path / "whole", device=CPU)
    with monkeypatch.context() as patch:
        patch.setattr("unrote.study.cells.write_sheet", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compare([file], tmp_path / "parts", device=CPU)
    (folder,) = (tmp_path / "parts" / "cells").iterdir()
    assert (folder / "run" / "run.json").exists() and not (folder / "trained.json").exists()
    parts = compare([file], tmp_path / "parts", device=CPU)
    assert parts["cells"][0]["points"] == whole["cells"][0]["points"]
    assert parts["cells"][0]["folder"] == whole["cells"][0]["folder"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"standard": {}, "longer": {"settings": {"training.epochs": 9}}}}, "equal samples seen"),
        ({"methods": {"standard": {}, "big": {"settings": {"training.batch_size": 9}}}}, "equal samples seen"),
        ({"methods": {"standard": {}, "big": {"settings": {"model.layers_per_block": 2}}}}, "equal model"),
        ({"methods": {"standard": {}, "other": {"settings": {"data.limit": 9}}}}, "equal images"),
        ({"methods": {"standard": {}, "x": {"settings": {"gate.skip_ration": 9}}}}, "method x.*gate.skip_ration"),
        ({"methods": {"standard": {}, "x": {"regimes": ["many"]}}}, "no regime 'many'"),
        ({"methods": {"agc": {}}}, "no method 'standard'"),
        ({"seeds": [1, 1]}, "twice"),
        ({"sedes": [1]}, "no key 'sedes'"),
    ],
)
def test_unequal_or_unknown_methods_are_refused(pictures, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load_study(study_file(tmp_path, pictures, **changes))


def test_mitigations_inside_the_model_and_the_data_are_methods(pictures, tmp_path):
    methods = {"standard": {}, "a": {"settings": {"model.dropout": 0.1, "data.random_flip": True}}}
    study = load_study(study_file(tmp_path, pictures, methods=methods))
    assert study.config("few", "a", 0, 20).model.dropout == 0.1


def test_a_deduplicated_method_sees_each_image_once_and_the_same_budget(pictures, tmp_path):
    images = {"source": pictures, "resolution": 8, "train": 20, "reference": 40, "repeats": {"share": 0.2, "times": 9}}
    file = study_file(tmp_path, pictures, methods={"standard": {}, "scan": {"deduplicate": True}})
    plan = yaml.safe_load(file.read_text())
    plan["regimes"]["few"]["images"] = images
    file.write_text(yaml.safe_dump(plan))
    ground = Ground(load_study(file), "few", 0, tmp_path)
    every, once = ground.images("standard"), ground.images("scan")
    assert len(every) == 16 + 4 * 9
    assert len(once) <= 20
    assert len({digest.tobytes() for digest in digests_of(once)}) == len(once)
    for method, images in (("standard", every), ("scan", once)):
        assert round(ground.cell(method).config.training.epochs * len(images)) == 96


def test_what_was_computed_under_other_defaults_is_not_taken(done):
    file, out, _ = done
    cell = Ground(load_study(file), "few", 0, out).cell("standard")
    written = (cell.folder.path / "cell.json").read_text()
    cell.check()
    kept = json.loads(written)
    kept["config"]["training"]["ema_decay"] = 0.5
    (cell.folder.path / "cell.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"training\.ema_decay: 0\.5 -> 0\.999"):
        cell.check()
    (cell.folder.path / "cell.json").write_text(written)


def guarded_study(folder, source, names):
    """One seed, sampled in more steps: without and with guards."""
    guards = {"standard": {}, "amg": {"guards": ["amg:threshold=1,strength=2"]}}
    guards["filter"] = {"guards": ["copy-filter:threshold=1,tries=2"]}
    file = study_file(folder, source, seeds=[0], methods={name: guards[name] for name in names})
    plan = yaml.safe_load(file.read_text())
    plan["regimes"]["few"] |= {"sampling": {"num": 12, "steps": 10, "batch_size": 12}, "snapshots": 1}
    file.write_text(yaml.safe_dump(plan))
    return file


def test_guards_are_methods_that_train_once_and_sample_as_the_command_does(pictures, tmp_path):
    file = guarded_study(tmp_path, pictures, ["amg", "standard", "filter"])
    out = tmp_path / "out"
    result = compare([file], out, device=CPU, keep=True)
    (run,) = out.glob("cells/*/run")
    ground = Ground(load_study(file), "few", 0, out)
    np.savez(tmp_path / "train.npz", images=ground.images("amg").images)
    pixels = {}
    for name in ("standard", "amg", "filter"):
        (snapshot,) = result["cells"][0]["snapshots"]
        with np.load(ground.cell(name).folder.samples_file(snapshot)) as arrays:
            pixels[name] = arrays["images"]
    model, made = Run(run).snapshot_folder(snapshot), tmp_path / "made.npz"
    guard = f"amg:threshold=1,strength=2,train={tmp_path / 'train.npz'}"
    sample(model, 12, steps=10, batch_size=12, guards=[guard], out=made)
    with np.load(made) as arrays:
        np.testing.assert_array_equal(pixels["amg"], arrays["images"])
    assert (pixels["amg"] != pixels["standard"]).any() and (pixels["filter"] != pixels["standard"]).any()
    assert len({cell["cpu_seconds"] for cell in result["cells"]}) == 1
    assert set(result["summary"]["few"]["spaces"]["random-conv"]["near-copies"]) == set(pixels)


def test_a_guard_that_is_added_later_trains_again_and_its_cost_is_one_training(pictures, tmp_path):
    out = tmp_path / "out"
    (first,) = compare([guarded_study(tmp_path, pictures, ["standard"])], out, device=CPU)["cells"]
    cells = compare([guarded_study(tmp_path, pictures, ["standard", "amg"])], out, device=CPU)["cells"]
    assert not list(out.glob("cells/*/run"))
    by_name = {cell["method"]: cell for cell in cells}
    assert by_name["standard"] == first
    assert by_name["amg"]["samples_seen"] == first["samples_seen"]
    (kept,) = out.glob("cells/*/time.json")
    spent = json.loads(kept.read_text())["cpu_seconds"]
    assert by_name["amg"]["cpu_seconds"] == spent < 1.9 * first["cpu_seconds"]


def test_a_monitored_method_is_the_model_that_its_monitor_chose(pictures, tmp_path):
    watched = {"monitor.every": 1, "monitor.samples": 16, "monitor.steps": 2, "monitor.max_overhead": 100}
    stopped = {"settings": watched | {"monitor.stop_when": "mq@1 > 0.5", "ensemble.local_epochs": 1}}
    file = study_file(tmp_path, pictures, seeds=[0], methods={"standard": {}, "stopped": stopped})
    out = tmp_path / "out"
    standard, cell = compare([file], out, device=CPU, keep=True)["cells"]
    assert "monitor" not in standard and len(standard["snapshots"]) == 2
    run = Run(out / "cells" / cell["folder"] / "run")
    looks = json.loads((run.path / "monitor.json").read_text())
    assert looks["stopped"] and cell["monitor"] == looks["overhead"] > 0
    # Nearly every sample is below a ratio of 1: the first look stops it.
    assert cell["snapshots"] == [looks["model_samples"]] == [cell["samples_seen"]] == [24]
    sample(run.model_folder, 12, steps=2, batch_size=12, out=tmp_path / "made.npz")
    kept = out / "cells" / cell["folder"] / f"samples-{cell['samples_seen']:09d}.npz"
    with np.load(tmp_path / "made.npz") as made, np.load(kept) as samples:
        np.testing.assert_array_equal(made["images"], samples["images"])


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("amgg", "methods.x.guards: --guard amgg: there is none"),
        ("repeat-words", "is for text-to-image models"),
        ("amg:train=other", "no train="),
    ],
)
def test_guards_that_a_study_can_not_have_are_refused(pictures, tmp_path, guard, message):
    with pytest.raises(InputError, match=message):
        load_study(study_file(tmp_path, pictures, methods={"standard": {}, "x": {"guards": [guard]}}))


@pytest.mark.parametrize("count", [7, 256, 4760])
def test_every_method_sees_exactly_the_budget(pictures, tmp_path, count):
    study = load_study(study_file(tmp_path, pictures))
    assert round(study.config("few", "standard", 0, count).training.epochs * count) == 96


def test_every_study_that_ships_is_valid():
    for path in STUDIES.glob("*.yaml"):
        assert load_study(path).name == path.stem


def test_only():
    assert Wanted.parse("few").fits("few", "agc", 3)
    assert Wanted.parse("*/agc/3").fits("few", "agc", 3) and not Wanted.parse("*/agc/3").fits("few", "agc", 2)
    with pytest.raises(InputError, match="REGIME/METHOD/SEED"):
        Wanted.parse("a/b/c/d")


def test_no_image_has_two_roles(pictures):
    plan = ImagesPlan(source=pictures, resolution=8, train=60, reference=40)
    first, second = choose_subjects(plan, 0), choose_subjects(plan, 1)
    apart = [first.train, first.control, first.reference, encoder_images(plan)]
    for place, store in enumerate(apart):
        for other in apart[place + 1 :]:
            assert not same_pixels(store, other).any()
    assert first.reference.fingerprint == second.reference.fingerprint
    assert first.train.fingerprint != second.train.fingerprint
    assert not same_pixels(second.train, encoder_images(plan)).any()
    assert [len(store) for store in apart] == [60, 60, 40, 200]
    with pytest.raises(InputError, match="there are 160"):
        choose_subjects(plan.model_copy(update={"train": 90}), 0)


def test_repeated_images_are_there_so_often(pictures):
    plan = ImagesPlan(source=pictures, resolution=8, train=50, reference=40, repeats=RepeatsPlan(share=0.1, times=7))
    subjects = choose_subjects(plan, 0)
    assert len(subjects.train) == 45 + 5 * 7 and subjects.repeated.sum() == 5
    digests = [digest.tobytes() for digest in digests_of(subjects.train)]
    own = [digest.tobytes() for digest in digests_of(subjects.distinct)]
    assert [digests.count(digest) for digest in own] == np.where(subjects.repeated, 7, 1).tolist()
    assert len(set(subjects.train.names)) == len(subjects.train)


def noise(count, seed):
    random = np.random.default_rng(seed)
    return in_memory_store(random.integers(0, 256, (count, 12, 12, 3), dtype=np.uint8), source=f"noise {seed}")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Noise with two repeated training images; samples: 6 exact, shifted or mirrored copies, and 10 new ones."""
    distinct, control, reference = noise(100, 1), noise(100, 2), noise(60, 3)
    repeated = np.arange(100) < 2
    train = distinct.subset(np.repeat(np.arange(100), np.where(repeated, 5, 1)))
    subjects = Subjects(train, distinct, repeated, control, reference)
    samples = noise(16, 4).images.copy()
    samples[0], samples[1], samples[2] = distinct.images[0], distinct.images[0], distinct.images[1]
    samples[3] = distinct.images[50][:, ::-1]
    samples[4] = np.roll(distinct.images[51], 1, axis=0)
    samples[5] = distinct.images[52]
    return Yardstick(subjects, [RandomConvEncoder()], tmp_path_factory.mktemp("cache")), samples


def test_planted_copies_are_counted(planted):
    yardstick, samples = planted
    found = yardstick.measure(samples)["memorization"]
    orbit = found["orbit"]
    assert (orbit["count"], orbit["distinct"], orbit["total"]) == (6, 5, 16)
    assert (orbit["repeated"]["count"], orbit["repeated"]["distinct"], orbit["repeated"]["of"]) == (3, 2, 2)
    assert (orbit["single"]["count"], orbit["single"]["distinct"]) == (3, 3)
    assert (found["plain"]["count"], found["plain"]["distinct"]) == (4, 3)  # not the mirrored, not the moved one
    assert found["calibrated"]["count"] >= 6
    closest = yardstick.measure(samples)["closest"]
    assert {(pair["sample"], pair["train"]) for pair in closest[:5]} == {(0, 0), (2, 1), (3, 50), (4, 51), (5, 52)}
    assert len({pair["train"] for pair in closest}) == len(closest)
    assert [pair["ratio"] for pair in closest] == sorted(pair["ratio"] for pair in closest)
    assert yardstick.control.unseen_below["count"] == 0


def test_numbers_are_those_of_the_audit(planted):
    yardstick, samples = planted
    subjects, found = yardstick.subjects, yardstick.measure(samples)
    report = audit(
        in_memory_store(samples, source="samples"), subjects.distinct, subjects.control, max_shift=yardstick.shift
    )
    ratios = report.curves[("orbit-distinct", "l2", "train")]
    assert found["memorization"]["orbit"]["count"] == (ratios < 0.5).sum()
    assert found["memorization"]["train_share"]["fraction"] == report.summary["train_share"]["orbit"]["fraction"]
    calibrated = report.summary["memorization"]["orbit"]["l2"]["calibrated"]
    assert found["memorization"]["calibrated"]["threshold"] == calibrated["threshold"]
    against = audit(in_memory_store(samples, source="samples"), subjects.distinct, subjects.reference)
    theirs = against.summary["spaces"]["random-conv"]["quality"]["generated"]
    ours = found["quality"]["random-conv"]
    assert ours["frechet_distance"]["value"] == pytest.approx(theirs["frechet_distance"]["value"], rel=1e-6)
    assert ours["precision"]["value"] == theirs["precision"]["value"]
    assert ours["recall"]["value"] == theirs["recall"]["value"]


def test_control_and_train_are_cut_to_one_size(tmp_path):
    distinct, control = noise(60, 1), noise(20, 2)
    subjects = Subjects(distinct, distinct, np.zeros(60, bool), control, noise(30, 3))
    yardstick = Yardstick(subjects, [RandomConvEncoder()], tmp_path)
    few = References(distinct, np.arange(60)).chosen(20, 0, "control").store
    # Copies of what is left out of the 20 do not count as nearest to train more often than chance.
    left = distinct.subset(np.flatnonzero(~same_pixels(distinct, few)))
    share = yardstick.measure(np.asarray(left.images))["memorization"]["train_share"]
    assert share["total"] == 40 and 0.2 < share["fraction"] < 0.8
    assert yardstick.measure(np.asarray(few.images))["memorization"]["train_share"]["fraction"] == 1.0


def test_the_classifier_learns_and_is_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "MIN_IMAGES", 800)
    random = np.random.default_rng(0)
    labels = np.arange(1000) % 2
    pixels = random.integers(0, 160, (1000, 8, 8, 3)) + 60 * labels[:, None, None, None]
    store = in_memory_store(pixels.astype(np.uint8), source="shades", labels=labels)
    first = classifier.trained_classifier(store, tmp_path / "a")
    assert first.accuracy > 0.9
    features = first(np.asarray(store.images[:300]))
    assert features.shape == (300, classifier.FEATURES) and features.dtype == np.float32
    assert np.allclose(features[7:8], first(np.asarray(store.images[7:8])), atol=1e-4)
    again = classifier.trained_classifier(store, tmp_path / "a")
    assert (again.weights_sha256, again.accuracy) == (first.weights_sha256, first.accuracy)
    assert classifier.trained_classifier(store, tmp_path / "b").weights_sha256 == first.weights_sha256
    assert classifier.trained_classifier(store.limit(700), tmp_path / "a") is None


def test_finished_runs_are_compared(pictures, tmp_path):
    images = toy_images(40, seed=9)
    names = ("standard", "agc")
    for name in names:
        toy_run(tmp_path / name, name, images=images, training__snapshots=2, data__resolution=8)
    train = tmp_path / "train.npz"
    np.savez(train, images=images.images)
    arguments = ["compare", *(str(tmp_path / name) for name in names), "--out", str(tmp_path / "out")]
    told = CliRunner().invoke(cli, [*arguments, "--train", str(train), "--num", "12", "--steps", "2"])
    assert isinstance(told.exception, InputError) and "--holdout" in str(told.exception)
    arguments += ["--holdout", pictures, "--num", "12", "--steps", "2", "--json"]
    result = CliRunner().invoke(cli, [*arguments, "--train", str(train)], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert [(cell["method"], len(cell["points"])) for cell in found["cells"]] == [(name, 2) for name in names]
    assert found["study"]["baseline"] == "standard"
    assert found["summary"]["runs"]["costs"]["agc"]["cpu_ratio"] is None
    assert (tmp_path / "out" / "study.html").exists()


def test_the_toy_study_from_the_command_line(tmp_path, module_cache):
    arguments = ["compare", str(STUDIES / "toy.yaml"), "--out", str(tmp_path), "--only", "*/*/0"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "| agc | 1 |" in result.output and str(tmp_path / "study.html") in result.output
    assert "Not computed yet: emoji-24 (seed 1): standard, agc." in result.output
