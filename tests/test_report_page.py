"""The page in a real browser: it is whole, needs no network, and strangers' names stay text."""

import base64
import csv
import io
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unrote.auditing import AuditReport, audit
from unrote.data import in_memory_store
from unrote.report.charts import Series, cumulative_chart, histogram_chart
from unrote.report.exports import pairs_csv, summary_markdown
from unrote.report.page import write_page
from unrote.report.sprites import COLUMNS, make_sheet

EVIL = "</script></style><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]


def make_report(name: str, *, copies: int, shape=(16, 16, 3), count: int = 40, holdout: bool = True) -> AuditReport:
    random = np.random.default_rng(0)
    train, fresh, unseen = (random.integers(0, 256, (count, *shape), dtype=np.uint8) for _ in range(3))
    fresh[:copies] = train[:copies]
    names = [f"{index}{EVIL}" for index in range(count)]
    ledger = {
        "visits": np.full(count, 50),
        "skips": random.integers(0, 9, count),
        "moves": random.integers(0, 3, count),
        "mean_ratio": np.linspace(0.2, 1, count, dtype=np.float32),
    }
    return audit(
        in_memory_store(fresh, source=EVIL, names=names),
        in_memory_store(train, source="train", names=names, captions=[EVIL] * count),
        in_memory_store(unseen, source="held-out") if holdout else None,
        max_shift=1,
        ledger=ledger,
        provenance={"sampler": "ddim", EVIL: EVIL},
        name=name,
    )


@pytest.fixture(scope="module")
def reports() -> list[AuditReport]:
    return [make_report(f"standard {EVIL}", copies=20), make_report("iet-agc+", copies=2)]


def page_text(reports: list[AuditReport], folder: Path, headline: str | None = None) -> str:
    write_page(reports, folder / "page.html", headline=headline)
    return (folder / "page.html").read_text(encoding="utf-8")


def browser(page: Path, folder: Path, *arguments: str) -> str:
    """Run the page in headless Chromium; returns its standard output."""
    if CHROMIUM is None and "CI" not in os.environ:
        pytest.skip("no Chromium on this machine")
    assert CHROMIUM is not None, "CI must have Chromium: the page is tested in a browser"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


class Tags(HTMLParser):
    """Counts start tags and collects attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


def test_names_and_captions_stay_text_in_a_browser(reports, tmp_path):
    write_page(reports, tmp_path / "page.html", headline=f"Result {EVIL}")
    dom = browser(tmp_path / "page.html", tmp_path, "--virtual-time-budget=2000", "--dump-dom")
    tags = Tags()
    tags.feed(dom)
    assert '<html lang="en" class="js">' in dom, "the page's own script ran"
    assert sum(tag == "script" for tag, _ in tags.seen) == 1 and not any(tag == "img" for tag, _ in tags.seen)
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title and title.group(1).startswith("Result &lt;/script")
    assert "40 of 40 shown" in dom, "the filter counted the pairs"


def test_the_policy_alone_stops_a_script_that_got_in(reports, tmp_path):
    """Defence in depth: were something not escaped, it still would not run."""
    text = page_text(reports, tmp_path).replace("</main>", f"{EVIL}</main>", 1)
    (tmp_path / "broken.html").write_text(text, encoding="utf-8")
    dom = browser(tmp_path / "broken.html", tmp_path, "--virtual-time-budget=2000", "--dump-dom")
    assert "<title>pwned</title>" not in dom


def test_filter_and_zoom(reports, tmp_path):
    """A second script, let in by taking the policy out, does what a reader would."""
    actions = """<script>
      document.querySelectorAll("section.run")[0].querySelector("input[type=checkbox]").click();
      const second = document.querySelectorAll("section.run")[1].querySelector("input[type=search]");
      second.value = "generated 7<"; second.dispatchEvent(new Event("input"));
      document.querySelector(".pair .images").click();
    </script></body>"""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page_text(reports, tmp_path)).replace("</body>", actions)
    (tmp_path / "acting.html").write_text(text, encoding="utf-8")
    dom = browser(tmp_path / "acting.html", tmp_path, "--virtual-time-budget=2000", "--dump-dom")
    assert "20 of 40 shown" in dom and "1 of 40 shown" in dom
    opened = dom[dom.index("<dialog") :]
    assert " open" in opened[: opened.index(">")] and opened.count('role="img"') == 2


def test_nothing_is_loaded_from_anywhere(reports, tmp_path):
    text = page_text(reports, tmp_path)
    tags = Tags()
    tags.feed(text)
    for tag, attributes in tags.seen:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not re.findall(r"url\((?!data:image/png;base64,)", text)
    assert "default-src 'none'" in text and "http://" not in text.replace("http-equiv", "")
    assert len(text) < 15_000_000


@pytest.mark.parametrize("width", [1280, 500])
def test_screenshot_is_not_blank(reports, tmp_path, width):
    write_page(reports, tmp_path / "page.html")
    shot = tmp_path / "shot.png"
    browser(tmp_path / "page.html", tmp_path, f"--window-size={width},2400", f"--screenshot={shot}")
    picture = np.asarray(Image.open(shot).convert("RGB"))
    assert picture.shape[1] == width and len(np.unique(picture.reshape(-1, 3), axis=0)) > 200
    assert (picture[:, -6:] == picture[5, -1]).all(), "nothing sticks out on the right"


def test_single_page_has_everything(reports, tmp_path):
    text = page_text(reports[:1], tmp_path)
    for words in ("worst first", "Most skipped in training", "Near-copies at every threshold", "How sure is this",
                  "Quality, next to memorization", "Provenance", "random-conv-64/1", "False alarms", "exact copy",
                  "came back 1×", "prefers-color-scheme"):  # fmt: skip
        assert words in text, words
    assert "Side by side" not in text


def test_several_runs_stand_side_by_side(reports, tmp_path):
    text = page_text([*reports, reports[1]], tmp_path, headline="A result")
    assert "Side by side" in text and "<h1>A result</h1>" in text and text.count('<section class="run">') == 3
    assert 'class="best"' in text


def test_no_holdout_no_ledger_one_channel(tmp_path):
    random = np.random.default_rng(1)
    grey = in_memory_store(random.integers(0, 256, (9, 12, 10, 1), dtype=np.uint8), source="grey")
    text = page_text([audit(grey, grey)], tmp_path)
    assert "No held-out set was given" in text and "Most skipped" not in text


def test_large_images_stay_below_15_megabytes(tmp_path):
    report = make_report("large", copies=3, shape=(160, 200, 3), count=60, holdout=False)
    text = page_text([report, report], tmp_path)
    assert len(text) < 15_000_000


def test_sheet_holds_the_pixels():
    images = np.random.default_rng(0).integers(0, 256, (COLUMNS + 3, 5, 7, 3), dtype=np.uint8)
    sheet = make_sheet("x", images)
    data = re.search(r"base64,([^)]*)", sheet.css)
    assert data
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data.group(1)))))
    np.testing.assert_array_equal(picture[5:10, 14:21], images[COLUMNS + 2])
    assert "background-position:13.3333% 100.0000%" in sheet.tile(COLUMNS + 2, "label")


def test_cumulative_chart_draws_the_share():
    chart = cumulative_chart([Series("a<b", np.array([0.25, 0.75]), "c0")], threshold=0.33, label="x")
    points = re.search(r'points="([^"]*)"', chart)
    assert points
    heights = [float(point.split(",")[1]) for point in points.group(1).split()]
    half = (max(heights) + min(heights)) / 2
    assert heights[100] == pytest.approx(half) and heights[-1] == min(heights) and "a&lt;b" in chart


def test_histogram_of_ratios_counts_one():
    """A ratio of exactly 1 (one training image) belongs to the last bin, not outside."""
    assert "<rect" in histogram_chart([Series("a", np.array([1.0]), "c0")], threshold=0.33, label="x")


def test_pairs_csv_is_read_back_and_starts_no_formula(reports):
    rows = list(csv.DictReader(io.StringIO(pairs_csv(reports[1]))))
    assert len(rows) == 40 and rows[0]["orbit_train_name"] == f"0{EVIL}" and rows[0]["ledger_visits"] == "50"
    assert float(rows[7]["ratio_squared_l2"]) == pytest.approx(reports[1].pairs["ratio_squared_l2"][7], rel=1e-8)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    store = in_memory_store(images, source="x", names=["=HYPERLINK(1)", "-2"])
    assert [row["name"] for row in csv.DictReader(io.StringIO(pairs_csv(audit(store, store))))] == [
        "'=HYPERLINK(1)",
        "'-2",
    ]


def test_summary_markdown_has_the_tables(reports):
    text = summary_markdown(reports[0])
    assert "| squared-l2, as they are | 0.33 | 50.0 %" in text and "not an FID" in text
