"""A process that dies before any one of its changes to the disk, again and again, ends up with the undisturbed run.

The kill tests hit moments; here the moments are chosen: from the n-th change of the file system on every further one
fails, as if the process had been killed there. No clean-up can hide it.
"""

import json
import logging
import os
import random
import sys
from contextlib import contextmanager

import pytest
import torch

import unrote.training.checkpoints
from toy import assert_same_run, toy_images, toy_run, weights_of
from unrote.errors import InputError
from unrote.method.slots import FolderSlots
from unrote.sampling import sample
from unrote.training.checkpoints import Checkpoints
from unrote.training.run import Run
from unrote.training.step import TrainingStep

IMAGES = toy_images(13)
QUICK = {
    "images": IMAGES,
    "ensemble__num_shards": 2,
    "ensemble__local_epochs": 1,
    "training__epochs": 2,
    "training__batch_size": 4,
    "training__checkpointing_steps": 1,
    "training__log_every_steps": 1,
}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


KINDS = ("json", "safetensors")


class DeadError(BaseException):
    """The process ended here."""


class Disk:
    """Counts changes of the file system, and lets none happen any more after a number of them."""

    def __init__(self):
        self.left = None
        self.count = 0
        sys.addaudithook(self._note)

    def _note(self, event, arguments):
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if self.left is None or not (writes or event in CHANGES):
            return
        self.count += 1
        if self.count > self.left:
            raise DeadError

    @contextmanager
    def dies_after(self, changes):
        """Inside the block, after ``changes`` changes; None counts only."""
        self.left, self.count = sys.maxsize if changes is None else changes, 0
        try:
            yield
        except DeadError:
            pass
        finally:
            self.left = None


@pytest.fixture(scope="module")
def disk():
    return Disk()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, disk):
    """A run of each method, and how many changes of the disk it made."""
    made = {}

    def of(method, **settings):
        key = (method, *settings)
        if key not in made:
            with disk.dies_after(None):
                run = toy_run(tmp_path_factory.mktemp("undisturbed") / "run", method, **QUICK, **settings)
            made[key] = run, disk.count
        return made[key]

    return of


@pytest.mark.parametrize("part", range(3))
def test_dying_before_any_change_of_the_disk(disk, undisturbed, tmp_path, part):
    """Every so many changes a death, then on to the end: all kinds of moments come up, each in some run."""
    run, changes = undisturbed("iet-agc+")
    assert changes > 60
    for moment in range(part, changes, 31):
        folder = tmp_path / str(moment)
        with disk.dies_after(moment):
            toy_run(folder, "iet-agc+", **QUICK)
        assert_same_run(toy_run(folder, "iet-agc+", **QUICK), run)
        assert [path.name for path in folder.rglob(".*")] == [".lock"]
        manifests = [json.loads(path.read_text()) for path in folder.glob("checkpoints/*.json")]
        assert set(names(folder / "proxies")) == {name for one in manifests for name in one["proxies"]}


@pytest.mark.parametrize("method", ["agc", "iet-agc+"])
def test_dying_many_times(disk, undisturbed, tmp_path, method):
    """As many deaths as it takes, each a few changes after the last: no resumption may need the next one to succeed.

    The longest stretch without a checkpoint is the writing of the outputs, some 45 changes.
    """
    run, _ = undisturbed(method)
    draw, folder, deaths = random.Random(method), tmp_path / "run", 0
    while not (folder / "run.json").exists():
        with disk.dies_after(draw.randint(12, 70)):
            toy_run(folder, method, **QUICK)
        deaths += 1
        assert deaths < 100, "it does not get on"
    assert deaths > 1
    assert_same_run(toy_run(folder, method, **QUICK), run)


@pytest.mark.parametrize(
    "settings",
    [
        {"training__channels_last": True},
        {"training__mixed_precision": "fp16"},
        {"model__dropout": 0.3, "training__lr_scheduler": "cosine"},
        {"ensemble__optimizer_state": "average"},
        {"ensemble__optimizer_state": "reset", "augmentation__ratio_source": "lookahead"},
    ],
    ids=lambda settings: " ".join(f"{key}={value}" for key, value in settings.items()),
)
def test_all_state_is_in_the_checkpoint(disk, undisturbed, tmp_path, settings):
    run, changes = undisturbed("iet-agc+", **settings)
    folder = tmp_path / "run"
    for moment in (changes // 2, 28):
        with disk.dies_after(moment):
            toy_run(folder, "iet-agc+", **QUICK, **settings)
    assert_same_run(toy_run(folder, "iet-agc+", **QUICK, **settings), run)
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())


def test_sampling_that_died_anywhere_goes_on(disk, undisturbed, tmp_path):
    run, _ = undisturbed("standard")
    options = {"steps": 2, "batch_size": 4}
    with disk.dies_after(None):
        expected = sample(run, 9, out=tmp_path / "expected", **options)
    changes = disk.count
    for moment in range(0, changes, 4):
        folder = tmp_path / str(moment)
        with disk.dies_after(moment):
            sample(run, 9, out=folder, **options)
        with disk.dies_after(5):
            sample(run, 9, out=folder, **options)
        sample(run, 9, out=folder, **options)
        for path in expected.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()


def stopped_run(disk, folder):
    """A run that died with two checkpoints; the manifests, newest last."""
    with disk.dies_after(90):
        toy_run(folder, "iet-agc+", **QUICK)
    manifests = sorted((folder / "checkpoints").glob("*.json"))
    assert len(manifests) == 2
    return manifests


@pytest.mark.parametrize("which", ["state", "proxy", "manifest"])
def test_with_a_damaged_newest_checkpoint_the_run_ends_the_same(disk, undisturbed, tmp_path, caplog, which):
    run, _ = undisturbed("iet-agc+")
    older, newest = stopped_run(disk, tmp_path / "run")
    own = set(json.loads(newest.read_text())["proxies"]) - set(json.loads(older.read_text())["proxies"])
    files = {"state": newest.with_suffix(".safetensors"), "manifest": newest}
    damage(files.get(which) or tmp_path / "run" / "proxies" / own.pop())
    with caplog.at_level(logging.WARNING, "unrote"):
        resumed = toy_run(tmp_path / "run", "iet-agc+", **QUICK)
    assert f"{newest.stem} is damaged" in caplog.text
    assert_same_run(resumed, run)


def test_without_a_whole_checkpoint_nothing_is_trained_or_changed(disk, tmp_path):
    folder = tmp_path / "run"
    for manifest in stopped_run(disk, folder):
        damage(manifest.with_suffix(".safetensors"))
    kept = {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    log = (folder / "log.jsonl").read_bytes()
    with pytest.raises(InputError, match="no checkpoint is whole"):
        toy_run(folder, "iet-agc+", **QUICK)
    assert {path: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == kept
    assert (folder / "log.jsonl").read_bytes() == log
    assert not (folder / "model").exists()


# Checkpoints by themselves.


def checkpoints_of(folder, limit=2):
    slots = FolderSlots(folder / "proxies")
    return Checkpoints(folder / "checkpoints", slots, limit), slots


def state_of(step, slots):
    return {"step": step, "weights": torch.full((3,), float(step)), "slots": slots.state_dict()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def three_saved(folder):
    checkpoints, slots = checkpoints_of(folder)
    for step in (3, 6, 9):
        slots.put("proxy-0", {"weights": torch.full((2,), float(step))})
        checkpoints.save(step, state_of(step, slots))
    return checkpoints, slots


def test_the_limit_is_kept_and_nothing_else(tmp_path):
    checkpoints, slots = three_saved(tmp_path)
    assert names(tmp_path / "checkpoints") == [f"00000000{step}.{kind}" for step in (6, 9) for kind in KINDS]
    assert len(names(tmp_path / "proxies")) == 2
    assert checkpoints.load_newest()["step"] == 9
    assert slots.get("proxy-0")["weights"].whole().tolist() == [9, 9]


def test_there_may_never_have_been_one(tmp_path):
    assert checkpoints_of(tmp_path)[0].load_newest() is None


@pytest.mark.parametrize("which", ["state", "proxy", "manifest", "garbage", "missing state", "missing proxy", "list"])
def test_a_damaged_one_is_said_and_the_one_before_used(tmp_path, caplog, which):
    three_saved(tmp_path)
    manifest = tmp_path / "checkpoints" / "000000009.json"
    state = manifest.with_suffix(".safetensors")
    (proxy,) = (tmp_path / "proxies" / name for name in json.loads(manifest.read_text())["proxies"])
    match which:
        case "state":
            damage(state)
        case "proxy":
            damage(proxy)
        case "manifest":
            manifest.write_text(manifest.read_text()[:-20])
        case "garbage":
            manifest.write_bytes(b"\xff\xfe\x00")
        case "missing state":
            state.unlink()
        case "missing proxy":
            proxy.unlink()
        case "list":
            manifest.write_text("[1, 2]")
    checkpoints, slots = checkpoints_of(tmp_path)
    with caplog.at_level(logging.WARNING, "unrote"):
        loaded = checkpoints.load_newest()
    assert loaded["step"] == 6
    assert "000000009 is damaged" in caplog.text
    slots.load_state_dict(loaded["slots"])
    assert slots.get("proxy-0")["weights"].whole().tolist() == [6, 6]


def test_a_damaged_one_does_not_take_the_place_of_a_whole_one(tmp_path):
    """Back at 6 because 9 is damaged, stopped at 7: then 6 and 7 are kept, so that one of them can be lost."""
    three_saved(tmp_path)
    damage(tmp_path / "checkpoints" / "000000009.safetensors")
    checkpoints, slots = checkpoints_of(tmp_path)
    slots.load_state_dict(checkpoints.load_newest()["slots"])
    slots.put("proxy-0", {"weights": torch.full((2,), 7.0)})
    checkpoints.save(7, state_of(7, slots))
    assert names(tmp_path / "checkpoints") == [f"00000000{step}.{kind}" for step in (6, 7) for kind in KINDS]
    damage(tmp_path / "checkpoints" / "000000007.safetensors")
    assert checkpoints_of(tmp_path)[0].load_newest()["step"] == 6


def test_none_whole_is_an_error_that_names_them_all(tmp_path):
    three_saved(tmp_path)
    for step in (6, 9):
        damage(tmp_path / "checkpoints" / f"00000000{step}.safetensors")
    before = names(tmp_path / "checkpoints")
    with pytest.raises(InputError, match=r"no checkpoint is whole \(000000009: .*; 000000006: .*backup"):
        checkpoints_of(tmp_path)[0].load_newest()
    assert names(tmp_path / "checkpoints") == before


@pytest.mark.parametrize("which", ["state", "proxy"])
def test_what_the_disk_made_something_else_of_is_noticed_before_an_older_one_goes(tmp_path, monkeypatch, which):
    checkpoints, slots = three_saved(tmp_path)
    slots.put("proxy-0", {"weights": torch.full((2,), 12.0)})
    kept, writing = names(tmp_path / "checkpoints"), unrote.training.checkpoints.save_state

    def badly_written(path, state):
        checksum = writing(path, state)
        damage(path)
        return checksum

    if which == "state":
        monkeypatch.setattr(unrote.training.checkpoints, "save_state", badly_written)
    else:
        damage(tmp_path / "proxies" / slots.files()[0])
    with pytest.raises(InputError, match=f"{'000000012' if which == 'state' else 'proxy-0'}.*something else than was"):
        checkpoints.save(12, state_of(12, slots))
    assert set(names(tmp_path / "checkpoints")) >= set(kept)
    checkpoints, slots = checkpoints_of(tmp_path)
    slots.load_state_dict(checkpoints.load_newest()["slots"])
    assert slots.get("proxy-0")["weights"].whole().tolist() == [9, 9]


# A proxy that diverges.


def run_that_diverges(folder, monkeypatch, times, **settings):
    """Weights of the second proxy become NaN in its fourth step, the first ``times`` times that it takes it."""
    monkeypatch.undo()
    plain = TrainingStep.__call__

    def poisoned(self, indices, *, proxy, step):
        result = plain(self, indices, proxy=proxy, step=step)
        if (proxy, step) == (1, 4) and self.retry.count < times:
            next(self.model.parameters()).data[:] = float("nan")
        return result

    monkeypatch.setattr(TrainingStep, "__call__", poisoned)
    return toy_run(folder, "iet-agc+", **QUICK | {"training__epochs": 4} | settings)


def test_a_proxy_that_diverges_begins_its_turn_again_with_other_draws(tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, "unrote"):
        run = run_that_diverges(tmp_path / "run", monkeypatch, 1)
    assert "proxy 1 has weights that are no numbers" in caplog.text and "goes back" in caplog.text
    (record,) = map(json.loads, (run.path / "diverged.jsonl").read_text().splitlines())
    assert (record["proxy"], record["retries"]) == (1, 0)
    assert run.read_ledger()["visits"].sum() == 13 * 4, "what was thrown away does not count"
    assert all(tensor.isfinite().all() for tensor in weights_of(run).values())
    # Whether the turn was amid checkpoints or not, and noticed soon or late, makes no difference to what comes out.
    late = {"training__checkpointing_steps": 1000, "training__log_every_steps": 1000}
    other = run_that_diverges(tmp_path / "late", monkeypatch, 1, **late)
    assert (other.path / "ledger.csv").read_bytes() == (run.path / "ledger.csv").read_bytes()
    assert all(torch.equal(tensor, weights_of(run)[name]) for name, tensor in weights_of(other).items())


def test_one_that_diverges_again_ends_the_run_with_the_evidence(tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"proxy 1 has weights.* at step \d+, for the second time in this run: .*diverged\.jsonl"
    ):
        run_that_diverges(tmp_path / "run", monkeypatch, 2)
    records = [json.loads(line) for line in (tmp_path / "run" / "diverged.jsonl").read_text().splitlines()]
    assert [(record["proxy"], record["retries"]) for record in records] == [(1, 0), (1, 1)]
    assert not (tmp_path / "run" / "model").exists()


def test_dying_after_a_divergence_changes_nothing(disk, tmp_path, monkeypatch):
    run = run_that_diverges(tmp_path / "run", monkeypatch, 1)
    folder, deaths = tmp_path / "dying", 0
    while not (folder / "run.json").exists():
        with disk.dies_after(60):
            run_that_diverges(folder, monkeypatch, 1)
        deaths += 1
    assert deaths > 1
    assert_same_run(Run(folder), run)


def test_in_the_end_what_a_killed_process_left_to_clear_away_goes_too(tmp_path):
    """It was killed after the last manifest was written, and the first one finished the run before it knew of that."""
    slots = FolderSlots(tmp_path / "proxies", ["proxy-0"])
    slots.put("proxy-0", {"weight": torch.ones(2)})
    other = tmp_path / "proxies" / "proxy-1.00000001.safetensors"
    other.write_bytes(b"of a checkpoint that was removed")
    checkpoints = Checkpoints(tmp_path / "checkpoints", slots, 2)
    checkpoints.save(1, {"steps": 1})
    assert other.exists()
    checkpoints.finish()
    assert [path.name for path in (tmp_path / "proxies").iterdir()] == slots.files()
