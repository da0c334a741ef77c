"""Thumbnails, charts and colours of the page."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unrote.report.charts import Series, cumulative_chart, histogram_chart, ratio_axis
from unrote.report.sprites import COLUMNS, LADDER, Album, make_sheet


def pictures(css: str) -> list[np.ndarray]:
    found = re.findall(r"base64,([^)]*)", css)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_sheet_holds_the_pixels():
    images = np.random.default_rng(0).integers(0, 256, (COLUMNS + 3, 5, 7, 3), dtype=np.uint8)
    sheet = make_sheet("x", images)
    np.testing.assert_array_equal(pictures(sheet.css)[0][5:10, 14:21], images[COLUMNS + 2])
    assert "background-position:13.3333% 100.0000%" in sheet.tile(COLUMNS + 2, "label")


def test_album_keeps_the_first_lossless_and_stays_within_its_budget():
    images = np.random.default_rng(0).integers(0, 256, (600, 24, 24, 3), dtype=np.uint8)
    keys = [("train", index) for index in range(600)]
    load_some = lambda some: images[[key[1] for key in some]]  # noqa: E731
    whole = Album("a", keys, [], load_some, 3_000_000)
    assert whole.words is None and whole.number(keys[-1]) == 599 and len(whole.css) < 3_000_000
    tight = Album("a", [*keys[:400], keys[0]], keys, load_some, 500_000)
    assert tight.words is not None and "JPEG" in tight.words and len(tight.css) < 500_000
    assert tight.number(keys[399]) == 399 and tight.number(keys[599]) == -1
    np.testing.assert_array_equal(pictures(tight.css)[0][:24, 24:48], images[1])
    assert "not in this file" in tight.tile(keys[599], "x") and "missing" not in tight.tile(keys[300], "x")
    nothing = Album("a", keys, [], load_some, 1000)
    assert nothing.css == "" and nothing.number(keys[0]) == -1


def test_album_reads_few_large_images_at_a_time():
    read = []

    def load_some(keys):
        read.append(len(keys))
        return np.full((len(keys), 2048, 2048, 3), 7, np.uint8)

    album = Album("a", [("train", index) for index in range(8)], [], load_some, 1_000_000)
    assert max(read) <= 2 and album.number(("train", 7)) == 7
    assert pictures(album.css)[0].shape == (96, 96 * COLUMNS, 3)


def test_jpeg_tiles_do_not_bleed_into_each_other():
    images = np.zeros((4, 20, 20, 3), dtype=np.uint8)
    images[1::2] = 255
    sheet = make_sheet("x", images, LADDER[2])
    tile = pictures(sheet.css)[0][:20, 32:52]
    assert tile.min() > 250, "white beside black"


def test_cumulative_chart_draws_the_share():
    chart = cumulative_chart([Series("a<b", np.array([0.25, 0.75]), "c0")], ratio_axis(0.33), label="x")
    points = re.search(r'points="([^"]*)"', chart)
    assert points
    heights = [float(point.split(",")[1]) for point in points.group(1).split()]
    half = (max(heights) + min(heights)) / 2
    assert heights[100] == pytest.approx(half) and heights[-1] == min(heights) and "a&lt;b" in chart


def test_histogram_counts_what_lies_at_and_beyond_the_ends():
    """A ratio of exactly 1, a negative cosine: in the first or last bin, not outside."""
    chart = histogram_chart([Series("a", np.array([1.0, -0.2]), "c0")], ratio_axis(0.33), label="x")
    assert chart.count("<rect") == 2


@pytest.mark.parametrize(
    ("values", "edge"), [([0.1] * 3, "100%"), ([0.1, 0.9], "60%"), ([n / 51 for n in range(50)], "4.0%")]
)
def test_histogram_ends_at_a_round_share_of_at_most_everything(values, edge):
    chart = histogram_chart([Series("a", np.array(values), "c0")], ratio_axis(0.33), label="x")
    assert re.findall(r'text-anchor="end">([\d.]+%)', chart)[-1] == edge


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_has_contrast(mode):
    """WCAG AA, 4.5 : 1, of every text colour on every ground."""
    css = (Path(make_sheet.__code__.co_filename).parent / "page.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{([^}]*)\}", css)
    colours = dict(re.findall(r"--([\w]+): (#[0-9a-f]+)", blocks[mode == "dark"]))
    for text in ("ink", "soft", "heavy", "some", "none"):
        for ground in ("paper", "card"):
            light, dark = sorted((luminance(colours[text]), luminance(colours[ground])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    values = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
