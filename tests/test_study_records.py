"""A study goes on from cells that another folder, or machine, computed."""

import json

import numpy as np
import pytest
import torch

from test_study import study_file
from toy import toy_images
from unrote.errors import InputError
from unrote.study import classifier
from unrote.study.plan import ImagesPlan
from unrote.study.records import Records
from unrote.study.results import compare
from unrote.study.run import quality_spaces

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path, module_cache):
    """400 different smooth pictures with labels, as a file."""
    store = toy_images(400, classes=4, seed=5)
    np.savez(tmp_path / "pictures.npz", images=store.images, labels=store.labels)
    return str(tmp_path / "pictures.npz")


def test_what_is_recorded_is_not_computed_again(pictures, tmp_path):
    file, records = study_file(tmp_path, pictures, seeds=[0]), tmp_path / "records"
    first = compare([file], tmp_path / "a", device=CPU, records=records, only=["few/standard"])
    assert first["missing"] == ["few/agc/0"] and len(list(records.glob("*.json"))) == 1
    second = compare([file], tmp_path / "b", device=CPU, records=records)
    assert second["missing"] == [] and second["cells"][0] == first["cells"][0]
    assert {(cell["machine"], cell["precision"]) for cell in second["cells"]} == {
        (torch.backends.cpu.get_cpu_capability(), second["cells"][0]["precision"])
    }
    # Only what was missing was trained here.
    assert [path.parent.name for path in (tmp_path / "b").glob("cells/*/trained.json")] == [
        second["cells"][1]["folder"]
    ]
    assert len(list(records.glob("*.json"))) == 2
    third = compare([file], tmp_path / "c", device=CPU, records=records)
    assert not list((tmp_path / "c").glob("cells/*/trained.json"))
    assert (third["cells"], third["summary"]) == (second["cells"], second["summary"])


def test_what_was_measured_otherwise_is_computed_and_what_had_other_defaults_refused(pictures, tmp_path):
    file, records = study_file(tmp_path, pictures, seeds=[0]), tmp_path / "records"
    only = ["few/standard"]
    compare([file], tmp_path / "a", device=CPU, records=records, only=only)
    (kept,) = records.glob("*.json")
    written = json.loads(kept.read_text())
    kept.write_text(json.dumps(written | {"yardstick": "another"}))
    again = compare([file], tmp_path / "b", device=CPU, records=records, only=only)
    assert len(again["cells"]) == 1 and list((tmp_path / "b").glob("cells/*/trained.json"))
    assert json.loads(kept.read_text())["yardstick"] == written["yardstick"]
    written["config"]["training"]["ema_decay"] = 0.5
    kept.write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"training\.ema_decay: 0\.5 -> 0\.999"):
        compare([file], tmp_path / "c", device=CPU, records=records, only=only)


def test_classifiers_travel_with_the_records(tmp_path, module_cache, monkeypatch):
    monkeypatch.setattr(classifier, "MIN_IMAGES", 200)
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    store = toy_images(600, classes=4, seed=5)
    np.savez(tmp_path / "labelled.npz", images=store.images, labels=store.labels)
    plan = ImagesPlan(source=str(tmp_path / "labelled.npz"), resolution=8, train=20, reference=40)
    records = Records(tmp_path / "records")
    trained = quality_spaces(plan, records.classifiers)[0]
    (weights,) = records.classifiers.glob("*.safetensors")
    quality_spaces.cache_clear()
    before = weights.stat().st_mtime_ns
    assert quality_spaces(plan, records.classifiers)[0].weights_sha256 == trained.weights_sha256
    assert weights.stat().st_mtime_ns == before
