"""Looks that take more than planned are spaced out, so that all of them stay within what was allowed."""

import json
import logging

import pytest

from toy import toy_run
from unrote.errors import InputError
from unrote.training import monitor, pace
from unrote.training.looks import Looks
from unrote.training.monitor import Monitor
from unrote.training.pace import Pace, next_every

LOOKS = {"monitor__every": 1, "monitor__samples": 2, "monitor__steps": 2, "monitor__max_overhead": 0.5}
LOOKS |= {"training__epochs": 24, "ensemble__enabled": False, "ensemble__local_epochs": 1}


@pytest.mark.parametrize("left", [1, 2, 7, 20])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("seconds", [0.0, 0.9, 1.0, 2.5, 3.0, 10.0, 100.0])
def test_as_many_looks_as_can_be_afforded_and_the_last_at_the_end(every, left, seconds):
    found = next_every(every, left, seconds, 1.0)
    planned = len([r for r in range(1, left + 1) if (left - r) % every == 0])
    assert (found == 0) == (seconds < 1)
    if found:
        rounds = [r for r in range(1, left + 1) if (left - r) % found == 0]
        assert rounds[-1] == left and len(rounds) <= min(planned, seconds)
        assert found == every or len([r for r in range(1, left + 1) if (left - r) % (found - 1) == 0]) > seconds


@pytest.mark.parametrize("content", ["", "[", "{}", "[1]", '[{"round": 1}]', '[{"round": "a", "every": 1}]'])
def test_a_damaged_file_is_named(tmp_path, content):
    file = tmp_path / "pace.json"
    file.write_text(content)
    with pytest.raises(InputError, match=r"pace\.json: is damaged; remove it"):
        Pace(Looks(1, 1, 4, 0.01), 4, 100, 0.05, file)


class Clock:
    """Stands still but for what a test lets pass: how busy a machine is decides nothing here."""

    def __init__(self):
        self.now = 0.0

    def time(self):
        return self.now

    monotonic = time


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A round takes a second; a look takes none."""
    clock, look = Clock(), Monitor.look

    def after_a_second(self, *arguments):
        clock.now += 1.0
        return look(self, *arguments)

    monkeypatch.setattr(pace, "time", clock)
    monkeypatch.setattr(monitor, "time", clock)
    monkeypatch.setattr(Monitor, "look", after_a_second)
    return clock


def dear(seconds, clock, monkeypatch):
    """Looks that take so long."""
    whole = Monitor._sampled

    def slow(self):
        clock.now += seconds
        return whole(self)

    monkeypatch.setattr(Monitor, "_sampled", slow)


def looks_of(run):
    return json.loads((run.path / "monitor.json").read_text())["looks"]


def test_dear_looks_are_made_more_rarely(tmp_path, clock, monkeypatch, caplog):
    alone = toy_run(tmp_path / "alone", **LOOKS | {"monitor__max_overhead": 100.0})
    assert len(looks_of(alone)) == 24
    dear(3.0, clock, monkeypatch)
    with caplog.at_level(logging.WARNING, "unrote"):
        run = toy_run(tmp_path / "run", **LOOKS | {"monitor__every": 4, "monitor__max_overhead": 0.4})
    # After 4 rounds 6.6 of 9.6 s are left, which is two looks more.
    assert [look["round"] for look in looks_of(run)] == [4, 14, 24]
    assert "to stay within monitor.max_overhead=0.4 the next are made every 10 rounds" in caplog.text
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [line["seconds"] for line in lines if "monitor" in line] == [3.0] * 3
    assert json.loads((run.path / "monitor.json").read_text())["overhead"] == pytest.approx(9 / 24)


def test_no_more_looks_where_none_can_be_afforded(tmp_path, clock, monkeypatch, caplog):
    dear(1.0, clock, monkeypatch)
    with caplog.at_level(logging.WARNING, "unrote"):
        run = toy_run(tmp_path / "run", **LOOKS | {"monitor__max_overhead": 0.01})
    assert [look["round"] for look in looks_of(run)] == [6], "of 6, 12, 18 and 24"
    assert "no more are made, nor at the end" in caplog.text
    decided = json.loads((run.path / "monitor.json").read_text())
    assert decided["model_samples"] == 24 * 26, "the last weights, though nobody looked at them"
    assert decided["overhead"] > 0.01


def test_what_was_decided_stands_when_a_run_goes_on(tmp_path, clock, monkeypatch):
    """Killed after a dear look, it goes on where looks are cheap, and looks at the rounds that it had settled on."""
    settings = LOOKS | {"training__checkpointing_steps": 3, "monitor__max_overhead": 0.01}

    class Killed(BaseException):
        pass

    whole = Monitor.look

    def deadly(self, rounds, *arguments):
        whole(self, rounds, *arguments)
        if rounds == 8:
            raise Killed

    with monkeypatch.context() as patched:
        dear(1.0, clock, patched)
        patched.setattr(Monitor, "look", deadly)
        with pytest.raises(Killed):
            toy_run(tmp_path / "run", **settings)
    run = toy_run(tmp_path / "run", **settings)
    assert [look["round"] for look in looks_of(run)] == [6], "of 6, 12, 18 and 24"
    monkeypatch.setattr(Monitor, "look", lambda *arguments: None)
    unwatched = toy_run(tmp_path / "unwatched", **settings)
    files = [run.model_folder.rglob("*.safetensors"), unwatched.model_folder.rglob("*.safetensors")]
    first, second = ([path.read_bytes() for path in sorted(part)] for part in files)
    assert first == second, "looks change nothing that is learned"
