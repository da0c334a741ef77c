"""The result of an audit in a run's model card."""

import json

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from toy import toy_images, toy_run
from unrote.card_section import BEGIN, END, section, with_section
from unrote.cli import cli
from unrote.config import METHODS, load_config
from unrote.errors import InputError
from unrote.report.model_card import comparison_table
from unrote.training.card import model_card, of_repository


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs whose samples are images at hand: the first gives back its training images, the second does not."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "pictures").mkdir()
    for index, pixels in enumerate(toy_images(12, side=16).images):
        Image.fromarray(pixels).save(folder / "pictures" / f"{index}.png")
    found = []
    for name, seed in (("copies", 0), ("new", 5)):
        settings = {"data__source": str(folder / "pictures"), "training__epochs": 1}
        run = toy_run(folder / name, images=folder / "pictures", **settings)
        (run.path / "samples").mkdir()
        for index, pixels in enumerate(toy_images(6, side=16, seed=seed).images):
            Image.fromarray(pixels).save(run.path / "samples" / f"{index:06d}.png")
        found.append(run)
    return found


def audited(run, out, *words):
    command = ["audit", str(run.path), "--train", str(run.path), "--max-shift", "0", "--out", str(out), *words]
    return CliRunner().invoke(cli, [*command, "--device", "cpu"], catch_exceptions=False)


def test_an_audit_of_a_run_is_in_both_cards_with_the_baseline_beside_it(runs, tmp_path):
    copies, new = runs
    before = (new.path / "README.md").read_text()
    settings = yaml.safe_load(before.split("```yaml\n")[1].split("```")[0])
    assert settings["model.block_out_channels"] == [32, 32] and settings["training.epochs"] == 1
    assert "training.adam_beta1" not in settings, "as everywhere"
    assert "not known until it is audited" in before and before == (new.model_folder / "README.md").read_text()
    assert audited(copies, tmp_path / "copies").exit_code == 0
    report = tmp_path / "copies" / "report.json"
    assert audited(new, tmp_path / "new", "--baseline", str(report)).exit_code == 0
    card = (new.path / "README.md").read_text()
    assert card == (new.model_folder / "README.md").read_text()
    assert "not known until it is audited" not in card and "## Limits" in card and card.startswith("---\n")
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("new", "copies"))
    assert f"**{first['verdict']['title']}.**" in card
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in card.splitlines() if line.startswith("|")]
    assert ["", "this model", "baseline"] in rows
    table = {row[0]: row[1:] for row in rows}
    assert table["distinct training images that came back"] == [
        str(s["extracted"]["distinct"]) for s in (first, second)
    ]
    assert table["distinct training images that came back"][1] == "6"
    # Too few images for a distance, which is therefore given here.
    for summary, value in ((first, 12.3456), (second, 7.0)):
        space = summary["spaces"][summary["quality_space"]]
        space["quality"]["generated"]["frechet_distance"] = {"value": value, "interval": [value - 1, value + 1]}
    distance = f"| Fréchet distance (`{space['encoder']}`) | 12.35 (11.35 to 13.35) | 7 (6 to 8) |"
    assert distance in comparison_table(first, second).splitlines()

    # Once more is the same; without the baseline its column goes; all else is as it was.
    assert audited(new, tmp_path / "new", "--baseline", str(report)).exit_code == 0
    assert (new.path / "README.md").read_text() == card
    assert audited(new, tmp_path / "new").exit_code == 0
    again = (new.path / "README.md").read_text()
    assert "baseline |" not in again and again.partition(BEGIN)[0] == before.partition(BEGIN)[0]
    assert again.partition(END)[2] == before.partition(END)[2]


def test_a_baseline_measured_otherwise_is_refused(runs, tmp_path):
    copies, new = runs
    audited(copies, tmp_path / "copies", "--no-flip")
    card = (new.path / "README.md").read_text()
    with pytest.raises(InputError, match="--baseline: was audited with other flip, num_transforms"):
        audited(new, tmp_path / "new", "--baseline", str(tmp_path / "copies" / "report.json"))
    assert (new.path / "README.md").read_text() == card
    words = ["audit", str(new.path / "samples"), "--train", str(new.path), "--baseline", str(tmp_path / "no.json")]
    with pytest.raises(InputError, match="--baseline: is for the model card of a run"):
        CliRunner().invoke(cli, words, catch_exceptions=False)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", r"cannot be read .*; give the report\.json of an audit"),
        ("[]", r"is no report\.json of an audit"),
        ('{"schema_version": "2", "memorization": {}}', r"is no report\.json of an audit"),
        ('{"schema_version": 0, "memorization": {}}', r"is no report\.json of an audit"),
        ('{"schema_version": 1, "memorization": {}}', "is a damaged report of version 1; run that audit again"),
        ('{"schema_version": 3, "memorization": {}}', "has version 3, this unrote knows 2 and older: .*pip install"),
    ],
)
@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--baseline", ["audit", "{run}", "--train", "{run}", "--baseline", "{file}"]),
        ("--from-report", ["retest", "{run}", "--from-report", "{file}"]),
    ],
)
def test_what_is_no_report_that_can_be_read_is_refused(runs, tmp_path, content, problem, flag, words):
    """A newer one may mean something else."""
    file = tmp_path / "report.json"
    file.write_text(content)
    command = [word.format(run=runs[1].path, file=file) for word in words]
    with pytest.raises(InputError, match=rf"{flag} .*report\.json: {problem}"):
        CliRunner().invoke(cli, command, catch_exceptions=False)


def test_cards_whose_marks_were_taken_out_get_the_section_at_the_end():
    assert with_section("# Mine\n", "result\n") == f"# Mine\n\n{section('result')}\n"
    assert with_section(f"# Mine\n\n{section('old')}\n\nMore\n", "new") == f"# Mine\n\n{section('new')}\n\nMore\n"


def card_of(method="standard", privacy=None, **settings):
    config = load_config(method=method, overrides={key.replace("__", "."): value for key, value in settings.items()})
    return model_card(config, toy_images(), 100, 10, privacy or {})


@pytest.mark.parametrize("method", METHODS)
def test_a_card_claims_what_the_method_is(method):
    card = card_of(method)
    assert ("IET-AGC+ lowers" in card, "is made to lower memorization" in card) == (False, method != "standard")
    assert ("were skipped" in card) == (method not in ("standard", "iet"))
    assert "no differential-privacy guarantee" in card
    private = card_of(method, {"epsilon": 3.14159, "delta": 1e-5})
    assert "ε = 3.14 at δ = 1e-05" in private and "no differential-privacy" not in private


@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_base_model_is_named_if_it_is_on_the_hub(tmp_path, monkeypatch, train):
    """A folder of the same form is none."""
    hub = card_of(model__pretrained="owner/base", model__train=train)
    assert "base_model: owner/base\n" in hub and "`owner/base`, trained with `standard`" in hub
    (tmp_path / "owner/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    local = card_of(model__pretrained="owner/base", model__train=train)
    assert "base_model" not in local and "owner/base" not in local and "text-to-image model, trained with" in local
    pushed = of_repository(hub, "me/mine")
    assert "`config.yaml`" in hub and "`config.yaml`" not in pushed and "model/" not in pushed
    if train == "full":
        assert 'from_pretrained("me/mine")' in pushed and "`variant='raw'` loads those without averaging." in pushed
        return
    assert 'from_pretrained("BASE_MODEL")' in local
    assert 'from_pretrained("owner/base")\npipeline.load_lora_weights("me/mine")' in pushed
    assert "The repository holds the averaged (EMA) weights; `raw/` has those without averaging." in pushed


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("emoji:holdout", True),
        ("hf:owner/set:test", True),
        ("photos/", False),
        ("owner/set", False),
        ("hf:../set", False),
    ],
)
def test_data_is_named_if_others_can_get_it(tmp_path, monkeypatch, source, shown):
    (tmp_path / "set").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    card = card_of(data__source=source, data__include="keep.txt")
    assert (f'data.source: "{source}"' in card) == shown and "keep.txt" not in card
