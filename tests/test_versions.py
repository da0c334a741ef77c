"""Files that earlier versions wrote are read as the present one would have written them; newer ones are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from toy import toy_images, toy_run
from unrote.auditing.reading import SCHEMA_VERSION, read_report
from unrote.auditing.verdict import certainty, verdict
from unrote.cli import cli
from unrote.config import Config, load_config, parse, read_yaml
from unrote.data.store import in_memory_store
from unrote.errors import InputError
from unrote.measures import audit
from unrote.report.model_card import check_comparable, comparison_table
from unrote.versions import migrated

OLDER = Path(__file__).parent / "older"
"""report-1/ was written by the code before version 2 (7e64414^) for the images below; config-1.yaml by e8af40d."""


def its_images():
    """What report-1 is about: one exact copy, four with noise, and seven images of their own."""
    train, noise = toy_images(12).images, np.random.default_rng(3).integers(-2, 3, (4, 8, 8, 3))
    near = np.clip(train[[3, 3, 7, 5]].astype(int) + noise, 0, 255).astype(np.uint8)
    generated = np.concatenate([train[[3]], near, toy_images(7, seed=2).images])
    sets = (generated, train, toy_images(10, seed=1).images)
    return [
        in_memory_store(images, source="toy", names=[f"{index:03d}.png" for index in range(len(images))])
        for images in sets
    ]


@pytest.fixture(scope="module")
def present():
    """The same images, audited now in the way of then: flips only, duplicates by equal pixels."""
    options = {"max_shift": 0, "scales": (), "brightness": (), "near_duplicates": False}
    return audit(*its_images(), name="samples", **options).summary


@pytest.fixture
def older(tmp_path):
    """A copy of report-1, and how to change it."""
    shutil.copytree(OLDER / "report-1", tmp_path / "report-1")
    file = tmp_path / "report-1" / "report.json"

    def changed(**sections):
        summary = json.loads(file.read_text())
        for name, values in sections.items():
            summary[name] |= values
        file.write_text(json.dumps(summary))
        return file

    return changed


def test_a_report_of_version_1_is_what_the_present_audit_says_where_both_know(older, present):
    found = read_report(older(), "--baseline")
    assert found["schema_version"] == present["schema_version"] == SCHEMA_VERSION == 2
    assert found.keys() == present.keys()
    for view, tables in present["memorization"].items():
        for definition, table in tables.items():
            old = found["memorization"][view][definition]
            assert old.keys() == table.keys()
            same = ("headline_threshold", "mq", "control", "unseen", "distinct_aware")
            assert {key: old[key] for key in same} == {key: table[key] for key in same}
            assert old["ratio_quantiles"] == pytest.approx(table["ratio_quantiles"])
    for key in ("exact_copies", "train_share", "duplicates", "ledger", "prompted", "clip_score", "copy_space"):
        assert found[key] == present[key], key
    assert [image.pop("ratio") for image in found["extracted"]["images"]] == pytest.approx(
        [image.pop("ratio") for image in present["extracted"]["images"]]
    )
    assert found["extracted"] == present["extracted"] and found["extracted"]["distinct"] == 3
    (old,), (new,) = found["spaces"].values(), present["spaces"].values()
    for side in ("generated", "floor"):
        distance = old["quality"][side]["frechet_distance"]
        assert distance["value"] == pytest.approx(new["quality"][side]["frechet_distance"]["value"], rel=1e-4)
        assert distance["interval"] is None
    assert (old["encoder"], old["weights_sha256"]) == (new["encoder"], new["weights_sha256"])


def test_it_stands_in_a_card_beside_a_present_one_and_its_words_can_be_written_again(older, present):
    found = read_report(older(), "--baseline")
    fingerprints = {role: present["data"][role]["fingerprint"] for role in ("train", "holdout")}
    assert {role: found["data"][role]["fingerprint"] for role in fingerprints} == fingerprints
    check_comparable(present, found)
    rows = [line.split(" | ") for line in comparison_table(present, found).splitlines()]
    copies = next(row for row in rows if "near-copies" in row[0])
    assert copies[1] == copies[2].removesuffix(" |")
    assert verdict(found)["level"] == found["verdict"]["level"] == present["verdict"]["level"]
    assert certainty(found)


def test_what_was_measured_otherwise_is_still_refused(older, present):
    """The borders of shifted views counted in version 1."""
    found = read_report(older(settings={"max_shift": 2, "num_transforms": 50}), "--baseline")
    with pytest.raises(InputError, match=r"was audited with other max_shift, num_transforms, features"):
        check_comparable(present, found)


def test_which_images_came_back_is_unknown_without_pairs_or_with_duplicates(older):
    report = older(counts={"train_duplicates": 1})
    found = read_report(report, "--from-report")
    assert found["extracted"] == {"distinct": 3, "images": None} and found["duplicates"]["clusters"] is None
    older(counts={"train_duplicates": 0})
    pairs = report.with_name("pairs.csv")
    lines = pairs.read_text().splitlines(keepends=True)
    for content in ("".join(lines[:3]), "".join(lines).replace("orbit_distance", "distance2"), None):
        pairs.unlink() if content is None else pairs.write_text(content)
        assert read_report(report, "--from-report")["extracted"] == {"distinct": 3, "images": None}


def test_retest_takes_its_images_from_an_older_report(older, tmp_path):
    images, folder = its_images()[1], tmp_path / "images"
    folder.mkdir()
    for name, pixels in zip(images.names, images.images, strict=True):
        Image.fromarray(pixels).save(folder / name)
    run = toy_run(tmp_path / "run", images=folder, training__epochs=1)
    command = ["retest", str(run.path), "--tries", "2", "--steps", "2", "--no-reconstruct", "--json", "--from-report"]
    done = CliRunner().invoke(cli, [*command, str(older())], catch_exceptions=False)
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["schema_version"] == 1
    assert [image["index"] for image in result["images"]] == [3, 7, 5]
    with pytest.raises(InputError, match=r"does not say which images came back; .*--index"):
        CliRunner().invoke(cli, [*command, str(older(counts={"train_duplicates": 1}))], catch_exceptions=False)


def test_an_early_configuration_is_read():
    """From before files had a version, and before half of the present settings."""
    file = OLDER / "config-1.yaml"
    config = parse(read_yaml(file), str(file))
    assert config == load_config(file=file, method="iet-agc+")
    assert (config.gate.skip_ratio, config.data.source, config.monitor.every) == (0.7, "photos", 0)
    written = yaml.safe_load(file.read_text())
    assert "version" not in written and "monitor" not in written
    assert parse(yaml.safe_load(config.to_yaml()), "again") == config != Config()


def test_each_step_leads_one_version_on():
    steps = (lambda old: {"b": old["a"]}, lambda old: old | {"c": old["b"] + 1})
    assert migrated({"a": 1}, 1, steps, "file") == {"b": 1, "c": 2}
    assert migrated({"b": 1}, 2, steps, "file") == {"b": 1, "c": 2}
    assert migrated({"x": 1}, 3, steps, "file") == {"x": 1}
    with pytest.raises(InputError, match=r"file: has version 4, this unrote knows 3 and older: .* newer one"):
        migrated({}, 4, steps, "file")
