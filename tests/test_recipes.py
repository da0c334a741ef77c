"""The figures of docs/recipes.md are those of the estimator."""

import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from unrote.config import load_config, preset_names
from unrote.data.store import in_memory_store
from unrote.training.plan import duration, make_plan

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text("utf-8")
BASE = {"fine-tune": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
"""The pipeline that is fine-tuned where a preset names none."""
LARGE = namedtuple("Usage", "total used free")(1 << 50, 0, 1 << 50)
ROWS = [
    (name, *(cell.strip() for cell in cells))
    for names, *cells in re.findall(r"^\| (`.*`) \|" + r"([^|]*)\|" * 9 + "$", PAGE, re.MULTILINE)
    for name in re.findall("`([^`]+)`", names)
]


def test_each_page_repeats_its_rows():
    pages = sorted((Path(__file__).parents[1] / "docs").glob("recipe-*.md"))
    assert len(pages) == 5
    for page in pages:
        text = page.read_text("utf-8")
        rows = re.findall(r"^\| `.*$", text, re.MULTILINE)
        assert rows and all(row in PAGE for row in rows), page.name
        assert "**Look at**" in text and "```sh" in text and f"({page.name})" in PAGE, page.name


def test_every_preset_has_a_row_but_the_demo_which_is_no_recipe():
    assert {name for name, *_ in ROWS} == set(preset_names()) - {"demo"}


def close(written, value, unit=""):
    """Whether a figure of the table is the value, rounded as it is written."""
    number, thousands = re.match(r"([\d,.]+) ?([MG]?)", written).groups()
    digits, factor = number.replace(",", ""), {"": 1, "M": 1e6, "G": 1 << 30}[thousands]
    decimals = len(digits.partition(".")[2])
    assert written.endswith(unit)
    return abs(value / factor - float(digits)) <= 0.5001 * 10**-decimals


@pytest.mark.parametrize(
    ("preset", "images", "parameters", "samples", "steps", "memory", "disk", "operations", "time"),
    [(row[0], *row[2:]) for row in ROWS],
    ids=[row[0] for row in ROWS],
)
def test_a_row_says_what_the_estimator_does(
    preset, images, parameters, samples, steps, memory, disk, operations, time, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: LARGE)
    count, side = (int(number.replace(",", "")) for number in re.match(r"([\d,]+) at (\d+)²", images).groups())
    base = {"model.pretrained": BASE[preset]} if preset in BASE else {}
    config = load_config(preset=preset, overrides=base)
    pixels = np.zeros((count, side, side, config.data.channels), np.uint8)  # memory of what is written only
    pixels[:, 0, :2, 0] = np.stack([np.arange(count) % 256, np.arange(count) // 256], axis=1)
    classes = 100 if preset == "cifar100" else 10
    labels, names = np.arange(count) % classes, tuple(map(str, range(classes)))
    captions = [f"a {index}" for index in range(count)]
    store = in_memory_store(pixels, source=preset, labels=labels, class_names=names, captions=captions)
    plan = make_plan(config, store, tmp_path / "run")
    assert close(parameters.removesuffix(" of adapters"), plan.parameters)
    assert close(samples, plan.samples_seen) and close(steps, plan.steps)
    assert close(memory, plan.state_bytes + plan.frozen_bytes + plan.activation_bytes, "GiB")
    assert close(disk, plan.disk_bytes, "GiB")
    assert operations == f"{plan.flops:.2g}"
    assert time == f"{duration(plan.flops / 1e13)}, {duration(plan.flops / 1e14)}"
    assert f"{time.split(', ')[0]} at 10 TFLOP/s sustained, {time.split(', ')[1]} at 100" in str(plan), "on the page"
