"""Looks while training: they change nothing that is learned, say what an audit would, and stop and keep as told."""

import json
import logging
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from doc_commands import ROOT, commands_of
from launching import in_process
from memorizing import LONG, pictures, save
from toy import SETTINGS, WALL_CLOCK, assert_same_run, everything_of, toy_images, toy_run, weights_of
from unrote.api import plan, train
from unrote.auditing import audit
from unrote.auditing.extracted import near_copies
from unrote.auditing.limits import MEASURES, parse_limit
from unrote.config import load_config
from unrote.data import open_images
from unrote.errors import InputError
from unrote.guards.quick import QuickAudit, smaller
from unrote.limits import MONITORED, StopRule, parse_stop_rule
from unrote.sampling import sample
from unrote.tensorfiles import load_state
from unrote.training.looks import plan_looks
from unrote.training.monitor import Monitor
from unrote.training.run import Run

LOOKS = {"monitor__every": 1, "monitor__samples": 6, "monitor__steps": 4, "monitor__max_overhead": 100.0}


def looks_of(run):
    records = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    return [record for record in records if "monitor" in record]


def decisions_of(run):
    found = json.loads((run.path / "monitor.json").read_text())
    assert found.pop("overhead") > 0, "by the clock"
    return found


@pytest.mark.parametrize("method", ["standard", "iet-agc+", "gap+"])
def test_looking_changes_nothing_that_is_learned(tmp_path, method):
    alone = toy_run(tmp_path / "alone", method)
    watched = toy_run(tmp_path / "watched", method, **LOOKS)
    assert len(looks_of(watched)) == 2
    for name, content in everything_of(alone).items():
        if name != "log":
            assert everything_of(watched)[name] == content, name


@pytest.mark.parametrize("classes", [0, 2])
def test_a_model_that_is_told_of_augmentation_is_looked_at_as_it_is_saved(tmp_path, monkeypatch, classes):
    seen, sampled = [], Monitor._sampled
    monkeypatch.setattr(Monitor, "_sampled", lambda self: seen.append(sampled(self)) or seen[-1])
    own = {"model__class_conditional": classes > 0, "monitor__stop_when": "mq@0.5 > 0.99"}
    run = toy_run(tmp_path / "run", "gap+", images=toy_images(classes=classes), **LOOKS | own)
    assert run.config.augmentation.labels
    folder = sample(run, len(seen[-1]), steps=run.config.monitor.steps, out=tmp_path / "samples")
    np.testing.assert_array_equal(seen[-1], open_images(folder, resolution=None).images)


def test_a_look_says_what_an_audit_of_the_snapshot_says(tmp_path):
    data = save(tmp_path, pictures(16))
    settings = LONG | {"training.epochs": 160, "training.snapshots": 2, "ensemble.local_epochs": 80}
    settings |= {"monitor.every": 1, "monitor.samples": 40, "monitor.steps": 10, "monitor.max_overhead": 9.0}
    settings |= {"monitor.stop_when": "mq-orbit-squared@0.4 > 0.99"}
    run = train(data, out=tmp_path / "run", method="standard", settings=settings)
    looks = looks_of(run)
    assert [look["samples"] for look in looks] == [1280, 2560]
    for look in looks:
        folder = sample(run.snapshot_folder(look["samples"]), 40, steps=10, out=tmp_path / str(look["samples"]))
        report = audit(open_images(folder, resolution=None), pictures(16))
        expected = parse_limit("mq-orbit-squared@0.4=0").measured(report)
        assert look["monitor"]["mq-orbit-squared@0.4"] == expected["fraction"]
        assert look["monitor"]["interval"] == list(expected["interval"])
        assert look["monitor"]["copied"] == near_copies(report.pairs).mean()
    assert looks[1]["monitor"]["copied"] > looks[0]["monitor"]["copied"] or looks[1]["monitor"]["copied"] > 0
    assert decisions_of(run) == {
        "schema_version": 1,
        "stop_when": "mq-orbit-squared@0.4 > 0.99",
        "stopped": False,
        "model_samples": 2560,
        "every": 1,
        "planned_overhead": pytest.approx(2 * 40 * 10 / (3 * 2560)),
        "prompts": None,
        "looks": [{key: value for key, value in look.items() if key not in WALL_CLOCK} for look in looks],
    }
    assert all(look["seconds"] > 0 for look in looks)
    picture = ElementTree.parse(run.path / "monitor.svg").getroot()
    lines = [line.get("points").split() for line in picture.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(line) for line in lines] == [2, 2]
    heights = [float(point.split(",")[1]) for point in lines[1]]
    shares = [look["monitor"]["mq-orbit-squared@0.4"] for look in looks]
    assert (heights[0] > heights[1]) == (shares[0] < shares[1]), "the more, the higher"


@pytest.mark.parametrize("measure", MONITORED)
def test_every_measure_is_that_of_the_audits_limits(measure):
    train_set = pictures(20)
    copies = train_set.images[:5].copy()
    copies[1:3] = copies[1:3, :, ::-1]
    images = np.concatenate([copies, pictures(15, seed=3).images])
    threshold = None if measure == "exact" else 0.6
    counts, distance = QuickAudit(train_set)(images, measure, threshold)
    report = audit(_store(images), train_set)
    written = measure if threshold is None else f"{measure}@{threshold}"
    expected = parse_limit(f"{written}=0").measured(report)
    assert {key: counts["measured"][key] for key in ("count", "total")} == {"count": expected["count"], "total": 20}
    assert counts["measured"]["count"] > 0
    assert distance is None


def _store(images):
    from unrote.data import in_memory_store

    return in_memory_store(images, source="samples")


def test_the_frechet_distance_is_that_of_the_audit():
    images, holdout = pictures(40, seed=3), pictures(40, seed=4)
    _, distance = QuickAudit(pictures(40), holdout)(images.images, "exact", None)
    quality = audit(images, pictures(40), holdout).summary["spaces"]["random-conv"]["quality"]
    assert distance == pytest.approx(quality["generated"]["frechet_distance"]["value"], rel=1e-9)


def test_what_can_be_monitored_is_a_limit_of_the_audit():
    assert set(MONITORED) == {*MEASURES, "exact"}


ALWAYS = {**LOOKS, "monitor__stop_when": "mq@1.0 > 0", "ensemble__local_epochs": 1}


def test_it_stops_when_told_and_is_finished(tmp_path, caplog):
    run = toy_run(tmp_path / "run", **ALWAYS)
    (look,) = looks_of(run)
    assert look["monitor"]["stop"]
    assert look["samples"] < 40, "of 104"
    assert run.finished
    assert decisions_of(run)["stopped"]
    assert json.loads((run.path / "run.json").read_text())["samples_seen"] == look["samples"]
    with caplog.at_level(logging.INFO, "unrote"):
        toy_run(tmp_path / "run", **ALWAYS)
    assert "nothing to do" in caplog.text


def best_named(out):
    """Samples after which the weights are best, by each of the checkpoints."""
    states = [load_state(path)["monitor"]["best"] for path in (out / "checkpoints").glob("*.safetensors")]
    return {best["samples"] for best in states if best is not None}


def best_kept(out):
    return {int(path.stem) for path in (out / "monitor").glob("*.safetensors")}


def test_stopped_in_the_middle_and_gone_on_it_is_the_same_run(tmp_path, monkeypatch):
    """Killed at each look, just before and just after it is made; checkpoints lie between looks."""
    from unrote.training.monitor import Monitor

    holdout = tmp_path / "holdout.npz"
    np.savez(holdout, images=toy_images(12, seed=5).images)
    settings = {**LOOKS, "monitor__stop_when": "mq@0.9 > 0.9", "monitor__keep_best": "pareto"}
    settings |= {"monitor__holdout": str(holdout), "training__checkpointing_steps": 2, "ensemble__local_epochs": 0.5}
    expected = toy_run(tmp_path / "undisturbed", **settings)
    assert len(looks_of(expected)) == 8

    class Killed(BaseException):
        pass

    whole = Monitor.look

    def deadly(self, rounds, samples, step, journal):
        if rounds == deadly.at and not deadly.after:
            raise Killed
        whole(self, rounds, samples, step, journal)
        if rounds == deadly.at:
            raise Killed

    monkeypatch.setattr(Monitor, "look", deadly)
    for deadly.at, deadly.after in ((1, True), (3, False), (5, True), (8, False), (8, True)):
        with pytest.raises(Killed):
            toy_run(tmp_path / "disturbed", **settings)
        assert best_named(tmp_path / "disturbed") <= best_kept(tmp_path / "disturbed")
    monkeypatch.undo()
    found = toy_run(tmp_path / "disturbed", **settings)
    assert_same_run(found, expected)
    kept, named = best_kept(expected.path), best_named(expected.path)
    assert decisions_of(expected)["model_samples"] in named
    assert kept == named
    assert decisions_of(found) == decisions_of(expected)


def test_where_each_look_is_the_best_only_what_checkpoints_name_stays_beside_it(tmp_path, monkeypatch):
    from unrote.training.monitor import Monitor

    holdout, keep, kept = tmp_path / "holdout.npz", Monitor.keep_best, []
    np.savez(holdout, images=toy_images(12, seed=5).images)
    settings = {**LOOKS, "monitor__stop_when": "mq@0.9 > 0.99", "monitor__keep_best": "pareto"}
    settings |= {"monitor__holdout": str(holdout), "training__checkpointing_steps": 2}
    settings |= {"ensemble__local_epochs": 0.25, "training__checkpoints_total_limit": 2}

    class Killed(BaseException):
        pass

    def counted(self, samples):
        keep(self, samples)
        kept.append(len(best_kept(tmp_path / "run")))
        if len(kept) in (7, 12):
            raise Killed

    monkeypatch.setattr(Monitor, "_rank", lambda self, look: -look["samples"])
    monkeypatch.setattr(Monitor, "keep_best", counted)
    for _ in range(2):
        with pytest.raises(Killed):
            toy_run(tmp_path / "run", **settings)
        assert best_named(tmp_path / "run") <= best_kept(tmp_path / "run")
    toy_run(tmp_path / "run", **settings)
    assert len(kept) >= 16
    assert max(kept) == 3
    assert best_named(tmp_path / "run") == best_kept(tmp_path / "run")


def test_pareto_finishes_with_the_look_nearest_to_real_images_among_those_allowed(tmp_path):
    data = save(tmp_path, pictures(16))
    np.savez(tmp_path / "holdout.npz", images=pictures(60, seed=9).images)
    settings = LONG | {"training.epochs": 240, "training.snapshots": 8, "ensemble.local_epochs": 30}
    settings |= {"monitor.every": 1, "monitor.samples": 32, "monitor.steps": 10, "monitor.max_overhead": 9.0}
    settings |= {"monitor.stop_when": "mq-orbit-squared@0.33 > 0.25", "monitor.keep_best": "pareto"}
    settings |= {"monitor.holdout": str(tmp_path / "holdout.npz")}
    run = train(data, out=tmp_path / "run", method="standard", settings=settings)
    looks = looks_of(run)
    shares = [look["monitor"]["mq-orbit-squared@0.33"] for look in looks]
    assert all(share <= 0.25 for share in shares[:-1])
    allowed = [look for look, share in zip(looks, shares, strict=True) if share <= 0.25]
    best = min(allowed, key=lambda look: look["monitor"]["frechet"])
    assert len(allowed) > 1
    assert decisions_of(run)["model_samples"] == best["samples"]
    if shares[-1] > 0.25:
        assert decisions_of(run)["stopped"]
        assert best is not looks[-1]
    said = f"The weights are those after {best['samples']:,} samples" in (run.path / "README.md").read_text()
    assert said == (best is not looks[-1])
    snapshot = Run(tmp_path / "run").snapshot_folder(best["samples"])
    for variant in (None, "raw"):
        name = f"diffusion_pytorch_model{'' if variant is None else '.' + variant}.safetensors"
        assert (run.model_folder / "unet" / name).read_bytes() == (snapshot / "unet" / name).read_bytes()


def test_where_every_look_is_beyond_the_least_copied_is_kept(tmp_path):
    np.savez(tmp_path / "holdout.npz", images=toy_images(12, seed=5).images)
    more = {"monitor__keep_best": "pareto", "monitor__holdout": str(tmp_path / "holdout.npz")}
    run = toy_run(tmp_path / "run", **{**ALWAYS, **more})
    assert decisions_of(run)["model_samples"] == looks_of(run)[0]["samples"]
    assert weights_of(run)


def test_looks_are_rarer_where_they_would_cost_too_much():
    settings = {"monitor.every": 2, "monitor.samples": 60, "monitor.steps": 50}

    def every(images, rounds, **changed):
        changed = {key.replace("__", "."): value for key, value in changed.items()}
        precise = {"training.mixed_precision": "no"}
        config = load_config(method="standard", overrides=settings | precise | changed)
        return plan_looks(config, images, rounds).every

    assert every(20_000, 10) == 2, "as asked: 3,000 forward passes for every 120,000 of training"
    assert every(1_000, 100) == 20, "5 looks of 3,000 are 5 % of 300,000"
    assert every(1_000, 100, training__mixed_precision="bf16") == 34, "3 looks are 5 % of 200,000"
    assert every(1_000, 100, monitor__max_overhead=0.5) == 2
    assert every(1_000, 20) == 20, "one look is 5 % of 60,000"
    with pytest.raises(InputError, match=r"a single look of 60 samples in 50 steps is 5\.3% .*max_overhead=0\.06"):
        every(1_000, 19)
    assert every(1_000, 19, monitor__max_overhead=0.06) == 19
    config = load_config(method="standard", overrides=settings | {"training.mixed_precision": "no"})
    found = plan_looks(config, 1_000, 100)
    assert (found.count, found.overhead) == (5, pytest.approx(0.05))
    assert str(found) == (
        "5 looks, every 20 rounds instead of every 2, to stay within monitor.max_overhead: 5.0% of training's work"
    )


def test_a_look_with_text_is_counted_with_guidance_and_decoding():
    def plan(reading=0.0, **changed):
        settings = {"monitor.every": 1, "monitor.samples": 10, "monitor.steps": 20, "model.pretrained": "base"}
        changed = {key.replace("__", "."): value for key, value in changed.items()}
        config = load_config(method="standard", overrides=settings | {"training.mixed_precision": "no"} | changed)
        return plan_looks(config, 1_000, 100, reading)

    passes = 1.5 * 10 * (2 * 20 + 4)
    assert plan().overhead == pytest.approx(plan().count * passes / 300_000)
    assert 0.04 < plan().overhead <= 0.05
    assert plan(monitor__guidance_scale=1).overhead == pytest.approx(plan(monitor__guidance_scale=1).count * 360 / 3e5)
    slow = plan(reading=300)
    assert 0 < slow.count < plan().count
    assert slow.overhead == pytest.approx((slow.count * passes + 1.5 * 10 * 2 * 300) / 3e5) and slow.overhead <= 0.05
    assert plan(model__train="lora").overhead == pytest.approx(plan(model__train="lora").count * passes / 200_000)


def test_a_style_affords_the_looks_that_its_recipe_says():
    cheap = {"monitor.every": 1, "monitor.samples": 8, "monitor.steps": 10, "monitor.max_overhead": 0.2}
    config = load_config(preset="art-style-lora", overrides=cheap)
    assert plan_looks(config, 3 * 60, 20).count == 5, "60 pictures, 20 rounds of three epochs"
    assert plan_looks(config, 3 * 16, 67).count == 4, "docs/faq.md: 16 pictures, 200 epochs"
    with pytest.raises(InputError, match=r"a single look of 64 samples in 25 steps is 72\.0%"):
        plan_looks(load_config(preset="art-style-lora", overrides={"monitor.every": 1}), 3 * 60, 20)


def test_the_plan_of_a_run_says_what_looking_costs(tmp_path):
    settings = SETTINGS | {"monitor.every": 1, "monitor.samples": 2, "monitor.steps": 2, "monitor.max_overhead": 0.05}
    config = load_config(method="standard", overrides=settings)
    assert "monitor      2 looks, every 1 rounds: 2.6% of training's work" in str(plan(config, toy_images(), tmp_path))
    config = load_config(method="standard", overrides=settings | {"monitor.steps": 20})
    with pytest.raises(InputError, match=r"monitor\.max_overhead: a single look"):
        plan(config, toy_images(), tmp_path)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_command_of_the_faq_looks_often_enough_at_300_images(tmp_path, monkeypatch, capsys, precision):
    (command,) = [one for one in commands_of(ROOT / "docs/faq.md") if "monitor.every" in one.line]
    for name, count in (("photos", 300), ("held-out", 30)):
        (tmp_path / name).mkdir()
        for index, pixels in enumerate(toy_images(count, side=32, seed=count).images):
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    words = [*command.arguments, "--dry-run", "--set", f"training.mixed_precision={precision}"]
    assert in_process(words, monkeypatch) == 0
    looks = int(re.search(r"^monitor +(\d+) looks", capsys.readouterr().out, re.MULTILINE)[1])
    assert looks == {"no": 10, "bf16": 7}[precision]


def test_large_images_are_compared_smaller():
    big = toy_images(12, side=128).images
    expected = big.reshape(12, 64, 2, 64, 2, 3).astype(float).mean((2, 4))
    assert np.abs(smaller(big) - expected).max() <= 0.5
    assert smaller(big[:, :96]).shape == (12, 48, 64, 3)
    small = toy_images(3).images
    assert smaller(small) is small
    queries = np.concatenate([big[:3], toy_images(5, side=128, seed=1).images])
    train_set, reduced = _store(big), _store(smaller(big))
    assert QuickAudit(train_set)(queries, "mq", 0.7) == QuickAudit(reduced)(smaller(queries), "mq", 0.7)


def test_a_stop_rule_is_read_as_it_is_written():
    assert parse_stop_rule("mq@0.5 > 0.01") == StopRule("mq", 0.5, 0.01)
    assert parse_stop_rule(" mq-orbit-squared@.33>0 ") == StopRule("mq-orbit-squared", 0.33, 0.0)
    assert parse_stop_rule("exact > 1e-3") == StopRule("exact", None, 0.001)
    assert [parse_stop_rule(f"{label} > 0").label for label in ("mq@0.5", "exact")] == ["mq@0.5", "exact"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop_when": "mq > 0.1"}, "write MEASURE@RATIO > SHARE"),
        ({"stop_when": "mq@0.5 < 0.1"}, "write MEASURE@RATIO > SHARE"),
        ({"stop_when": "similarity@0.5 > 0.1"}, "MEASURE one of mq"),
        ({"stop_when": "mq@1.5 > 0.1"}, "lies in"),
        ({"stop_when": "mq@0.5 > 1"}, "no share below 1"),
        ({"stop_when": "mq@0.5 > 0.01", "every": 0}, "set every to 1 or more"),
        ({"keep_best": "pareto"}, "needs stop_when"),
        ({"keep_best": "pareto", "stop_when": "mq@0.5 > 0.01"}, "and holdout"),
        ({"steps": 7}, "must divide model.num_train_timesteps, 1000"),
    ],
)
def test_wrong_settings_are_named_with_the_way_out(settings, message):
    overrides = {f"monitor.{key}": value for key, value in ({"every": 1} | settings).items()}
    with pytest.raises(InputError, match=message):
        load_config(method="standard", overrides=overrides)


def test_held_out_images_that_do_not_fit_are_refused_before_training(tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "holdout.npz", images=toy_images(1).images)
    with pytest.raises(InputError, match="two images or more"):
        toy_run(tmp_path / "run", **LOOKS, monitor__holdout=str(tmp_path / "holdout.npz"))
    with pytest.raises(InputError, match=r"monitor\.holdout: "):
        toy_run(tmp_path / "other", **LOOKS, monitor__holdout=str(tmp_path / "nothing.npz"))
    np.savez(tmp_path / "toy.npz", images=toy_images().images)
    words = ["train", "--data", str(tmp_path / "toy.npz"), "--out", str(tmp_path / "dry"), "--dry-run"]
    for name in ("nothing.npz", "holdout.npz"):
        told = {"monitor.every": 1, "monitor.max_overhead": 100, "monitor.holdout": tmp_path / name}
        told = [word for key, value in told.items() for word in ("--set", f"{key}={value}")]
        assert in_process([*words, *told], monkeypatch) == 2
        assert "monitor.holdout: " in capsys.readouterr().err
