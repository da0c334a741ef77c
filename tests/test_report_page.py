"""The page in a real browser: it is whole, needs no network, strangers' names stay text, its controls work."""

import dataclasses
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import Browser
from unrote.auditing import AuditReport, audit
from unrote.data import in_memory_store, open_images
from unrote.encoders import load_encoder
from unrote.report.gallery import pair_views, worst_pairs
from unrote.report.originals import load
from unrote.report.page import write_page

EVIL = "</script></style><script>window.x='pwned'</script><img src=x onerror=\"window.x='pwned'\"><!--"
FIRST = "document.querySelectorAll('section.run')[0]"


def pooled(images: np.ndarray) -> np.ndarray:
    """A copy detector for tests: four quarters of the image and its colours."""
    n, height, width, channels = images.shape
    halves = images[:, : height // 2 * 2, : width // 2 * 2].astype(np.float32)
    halves = halves.reshape(n, 2, height // 2, 2, width // 2, channels).mean((2, 4)).reshape(n, -1)
    return halves - halves.mean(1, keepdims=True)


def make_report(name: str, *, copies: int, shape=(16, 16, 3), count: int = 40, holdout: bool = True) -> AuditReport:
    random = np.random.default_rng(0)
    train, fresh, unseen = (random.integers(0, 256, (count, *shape), dtype=np.uint8) for _ in range(3))
    fresh[:copies] = train[:copies]
    fresh[copies // 2 : copies] = train[copies // 2 : copies, :, ::-1]
    train[-2] = train[-1]
    names = [f"{index}{EVIL}" for index in range(count)]
    ledger = {
        "visits": np.full(count, 50),
        "skips": random.integers(0, 9, count),
        "moves": random.integers(0, 3, count),
        "mean_ratio": np.linspace(0.2, 1, count, dtype=np.float32),
    }
    return audit(
        in_memory_store(fresh, source=EVIL, names=names, captions=[f"prompt {index} {EVIL}" for index in range(count)]),
        in_memory_store(train, source="train", names=names, captions=[EVIL] * count),
        in_memory_store(unseen, source="held-out") if holdout else None,
        max_shift=1,
        encoders=[load_encoder(pooled)],
        false_positive_rate=0.1,
        ledger=ledger,
        provenance={"sampler": "ddim", EVIL: EVIL},
        name=name,
    )


@pytest.fixture(scope="module")
def reports() -> list[AuditReport]:
    return [make_report(f"standard {EVIL}", copies=20), make_report("iet-agc+", copies=2)]


@pytest.fixture(scope="module")
def page(reports, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(reports, path, headline=f"Result {EVIL}")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as started:
        yield started


def page_text(reports: list[AuditReport], folder: Path) -> str:
    write_page(reports, folder / "page.html")
    return (folder / "page.html").read_text(encoding="utf-8")


def in_first(selector: str) -> str:
    return f"section.run {selector}"


def texts(browser: Browser, slot: str) -> list[str]:
    return browser.run(f"[...{FIRST}.querySelectorAll('.pair [data-slot={slot}]')].map(e => e.textContent)")


def test_names_and_captions_stay_text(page, browser):
    browser.open(page)
    browser.choose(in_first("input[type=search]"), "script")
    browser.run("document.querySelector('.pair .images').click()")
    assert browser.run("window.x") is None and not browser.run("document.querySelectorAll('img').length")
    assert browser.run("document.title").startswith("Result </script")
    assert browser.run("[...document.scripts].filter(s => !s.type).length") == 1, "the page's own script alone"
    assert browser.run("document.querySelector('dialog b').textContent").endswith(EVIL)
    assert browser.run("document.documentElement.className") == "js" and not browser.complaints


def test_the_policy_alone_stops_a_script_that_got_in(page, browser, tmp_path):
    """Defence in depth: were something not escaped, it still would not run."""
    text = page.read_text(encoding="utf-8").replace("</main>", f"{EVIL}--></main>", 1)
    (tmp_path / "broken.html").write_text(text, encoding="utf-8")
    browser.open(tmp_path / "broken.html")
    assert browser.run("document.querySelectorAll('img').length") == 1, "it did get in"
    assert browser.run("window.x") is None and any("Content Security Policy" in said for said in browser.complaints)
    browser.complaints.clear()


def test_filters_count_what_the_columns_say(page, browser, reports):
    pairs, output = reports[0].pairs, f"{FIRST}.querySelector('output').textContent"
    browser.open(page)
    assert browser.run(output) == "40 of 40 pairs"
    browser.choose(in_first("input[type=checkbox]"), True)
    assert browser.run(output) == f"{(pairs['orbit_ratio_distinct'] < 0.33).sum()} of 40 pairs" == "20 of 40 pairs"
    browser.choose(in_first("select[data-control=threshold]"), "0.9")
    assert browser.run(output) == f"{(pairs['orbit_ratio_distinct'] < 0.9).sum()} of 40 pairs"
    browser.choose(in_first("select[data-control=view]"), "1")
    assert browser.run(output) == f"{(pairs['ratio_distinct'] < 0.33).sum()} of 40 pairs" == "10 of 40 pairs"
    browser.choose(in_first("select[data-control=view]"), "2")
    threshold = reports[0].summary["spaces"]["custom"]["similarity"]["calibrated"]["threshold"]
    assert browser.run(output) == f"{(pairs['custom_similarity'] > threshold).sum()} of 40 pairs"
    browser.choose(in_first("input[type=checkbox]"), False)
    browser.choose(in_first("input[type=search]"), "PROMPT 17 ")
    assert browser.run(output) == "1 of 40 pairs"
    wanted = [f"17{EVIL}" in (pairs["name"][i], pairs["custom_train_name"][i]) for i in range(40)]
    browser.choose(in_first("input[type=search]"), "17</SCRIPT")
    assert browser.run(output) == f"{sum(wanted)} of 40 pairs" and sum(wanted) >= 1


def test_sorting(page, browser, reports):
    pairs = reports[0].pairs
    browser.open(page)
    scores = [float(text) for text in texts(browser, "score")]
    assert scores == sorted(scores) and len(scores) == 40
    browser.choose(in_first("select[data-control=sort]"), "best")
    assert [float(text) for text in texts(browser, "score")] == sorted(scores, reverse=True)
    browser.choose(in_first("select[data-control=sort]"), "name")
    assert texts(browser, "name") == sorted(pairs["name"])
    browser.choose(in_first("select[data-control=view]"), "2")
    browser.choose(in_first("select[data-control=sort]"), "worst")
    shown = [float(text) for text in texts(browser, "score")]
    assert shown == pytest.approx(sorted(pairs["custom_similarity"], reverse=True), abs=6e-4)
    by_name = dict(zip(pairs["name"], pairs["custom_train_name"], strict=True))
    assert [by_name[name] for name in texts(browser, "name")] == texts(browser, "train")


def test_zoom_with_the_keyboard(page, browser):
    browser.open(page)
    is_open, figures = "document.querySelector('dialog').open", "[...document.querySelectorAll('dialog figcaption')]"
    flip = next(card for card, text in enumerate(texts(browser, "detail")) if text.endswith("· flip"))
    browser.run(f"document.querySelectorAll('.pair .images')[{flip - 1}].focus()")
    browser.press("Enter")
    assert browser.run(is_open)
    browser.press("ArrowRight")
    labels = browser.run(f"{figures}.map(e => e.textContent)")
    assert labels == ["generated", "training image, as matched: flip", "training image, as it is",
                      "difference (black: none)"]  # fmt: skip
    assert browser.run("document.querySelectorAll('dialog .tile.missing').length") == 0
    browser.press("ArrowLeft")
    assert browser.run(f"{figures}.length") in (3, 4)
    browser.press("Escape")
    assert not browser.run(is_open)
    assert browser.run(f"document.activeElement === document.querySelectorAll('.pair .images')[{flip - 1}]")


def test_the_difference_of_an_exact_copy_is_black(page, browser, tmp_path):
    browser.open(page)
    browser.run("document.querySelector('.pair.copy .images').click()")
    box = browser.run("JSON.stringify([...document.querySelectorAll('dialog .box')].at(-1).getBoundingClientRect())")
    area = {key: float(value) for key, value in re.findall(r'"(x|y|width|height)":([\d.]+)', box)}
    browser.screenshot(tmp_path / "zoom.png")
    left, top = int(area["x"] + area["width"] / 4), int(area["y"] + area["height"] / 4)
    picture = np.asarray(Image.open(tmp_path / "zoom.png").convert("RGB"))
    inner = picture[top : top + int(area["height"] / 2), left : left + int(area["width"] / 2)]
    assert inner.size and inner.max() == 0


def test_without_javascript_the_worst_pairs_are_there(page, browser, tmp_path):
    browser.open(page, height=4000, scripts=False)
    browser.screenshot(tmp_path / "shot.png")
    document = browser.send("DOM.getDocument", depth=1)["root"]["nodeId"]
    html = browser.send("DOM.getOuterHTML", nodeId=document)["outerHTML"]
    assert 'class="js"' not in html and html.count('<li class="pair copy">') >= 20
    picture = Image.open(tmp_path / "shot.png").convert("RGB")
    assert picture.getcolors(5000) is None, "more colours than that: the pictures are noise"


def test_nothing_is_loaded_from_anywhere(page, browser):
    browser.requests.clear()
    browser.open(page)
    browser.choose(in_first("select[data-control=sort]"), "name")
    browser.run("document.querySelector('.pair .images').click()")
    assert {address.split(":")[0] for address in browser.requests} == {"file", "data"}
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    for tag, attributes in tags.seen:
        assert not {"src", "href", "srcset", "action"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    assert not re.findall(r"url\((?!data:image/(?:png|jpeg);base64,)", text)
    assert "default-src 'none'" in text and "http://" not in text.replace("http-equiv", "")


class Tags(HTMLParser):
    """Collects start tags and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))


@pytest.mark.parametrize("width", [1280, 500, 340])
def test_nothing_sticks_out_on_the_right(page, browser, width):
    browser.open(page, width=width)
    assert browser.run("document.documentElement.scrollWidth") == width


def ten_thousand(report: AuditReport, number: int = 10_000) -> AuditReport:
    """The report as if so many images had been generated: as hard to compress as photographs."""
    random = np.random.default_rng(0)
    emoji = np.asarray(open_images("emoji", resolution=None).images)
    noise = random.integers(-25, 26, (number, *emoji.shape[1:]), dtype=np.int16)
    images = np.clip(np.resize(emoji, (number, *emoji.shape[1:])) + noise, 0, 255).astype(np.uint8)
    names = [f"samples/step-{index % 7}/{index:06d}.png" for index in range(number)]
    generated = in_memory_store(images, source="samples", names=names)
    train = in_memory_store(images[::-1], source="train", names=names, captions=[f"caption {name}" for name in names])
    pairs = {column: np.resize(values, number) for column, values in report.pairs.items()}
    ratios = random.uniform(0.1, 1, number)
    pairs |= {"index": np.arange(number), "name": np.array(names, dtype=object), "custom_similarity": 1 - ratios}
    for column in ("train_index", "orbit_train_index", "custom_train_index"):
        pairs[column] = random.permutation(number)
    for prefix in ("", "orbit_"):
        pairs |= {f"{prefix}ratio_distinct": ratios, f"{prefix}distance": ratios}
    return dataclasses.replace(report, pairs=pairs, generated=generated, train=train, ledger=None)


def test_ten_thousand_pairs(reports, browser, tmp_path):
    """All of them on a page below 15 MB that is usable within seconds."""
    report = ten_thousand(reports[1])
    write_page([report], tmp_path / "page.html")
    assert 5_000_000 < (tmp_path / "page.html").stat().st_size < 15_000_000
    browser.complaints.clear()
    started = time.monotonic()
    browser.open(tmp_path / "page.html")
    assert browser.run("document.querySelector('output').textContent") == "10,000 of 10,000 pairs"
    assert time.monotonic() - started < 10, "about a second on a free core"
    assert browser.run("document.querySelectorAll('*').length") < 10_000, "only one page of pairs is drawn"
    assert browser.run("document.querySelectorAll('ul.all .tile.missing').length") == 0
    worst = np.sort(report.pairs["orbit_ratio_distinct"])
    assert [float(text) for text in texts(browser, "score")[:60]] == pytest.approx(worst[:60], abs=6e-4)
    browser.run("document.querySelector('nav.pager [data-page=\"1\"]').click()")
    assert [float(text) for text in texts(browser, "score")[:60]] == pytest.approx(worst[60:120], abs=6e-4)
    started = time.monotonic()
    browser.choose(in_first("input[type=search]"), "step-3/000")
    browser.choose(in_first("select[data-control=sort]"), "name")
    assert time.monotonic() - started < 5
    assert texts(browser, "name")[0] == sorted(report.pairs["name"])[0] or "step-3/000" in texts(browser, "train")[0]
    assert not browser.complaints


def test_only_the_worst_ten_thousand_of_more(reports):
    views = pair_views(reports[0])
    worst = worst_pairs(views, 7)
    ratios = reports[0].pairs["orbit_ratio_distinct"]
    assert len(worst) == 7 and ratios[worst[0]] == 0
    similar = reports[0].pairs["custom_similarity"].argmax()
    assert similar in worst, "the worst by similarity are among them too"


def test_single_page_has_everything(reports, tmp_path):
    clip = {"model": "<m>", "num": 40, "value": 27.1, "interval": [26.0, 28.0]}
    report = dataclasses.replace(reports[0], summary={**reports[0].summary, "clip_score": clip})
    text = page_text([report], tmp_path)
    for words in ("worst first", "Most skipped in training", "Near-copies at every threshold", "How sure is this",
                  "Quality, next to memorization", "Provenance", "random-conv-64/1", "false alarms", "exact copy",
                  "came back 1×", "prefers-color-scheme", "Training images that came back", "Similarity", "AuthPct",
                  "C<sub>T</sub>", "Calibrated on the held-out images", "cluster", "encoder custom",
                  "CLIP score", "26.0 to 28.0", "&lt;m&gt;"):  # fmt: skip
        assert words in text, words
    assert "Side by side" not in text and ">FID<" not in text


def test_several_runs_stand_side_by_side(reports, tmp_path):
    write_page([*reports, reports[1]], tmp_path / "page.html", headline="A result")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Side by side" in text and "<h1>A result</h1>" in text and text.count('<section class="run">') == 3
    assert 'class="best"' in text


def test_no_holdout_no_ledger_one_channel(tmp_path):
    random = np.random.default_rng(1)
    grey = in_memory_store(random.integers(0, 256, (9, 12, 10, 1), dtype=np.uint8), source="grey")
    text = page_text([audit(grey, grey)], tmp_path)
    assert "No held-out set was given" in text and "Most skipped" not in text and "<h3>Similarity" not in text


def test_compared_as_they_are_only(tmp_path, browser):
    images = np.random.default_rng(3).integers(0, 256, (130, 8, 8, 3), dtype=np.uint8)
    store, other = in_memory_store(images[:20], source="x"), in_memory_store(images[20:], source="y")
    text = page_text([audit(store, store, other, flip=False, max_shift=0, scales=(), brightness=())], tmp_path)
    assert "up to nothing" not in text.split("How sure is this")[0] and "Calibrated" in text
    browser.open(tmp_path / "page.html")
    assert browser.run("document.querySelector('select').options.length") == 1 and not browser.complaints


def test_large_images_stay_below_15_megabytes(tmp_path):
    report = make_report("large", copies=3, shape=(160, 200, 3), count=24, holdout=False)
    assert len(page_text([report, report], tmp_path)) < 15_000_000


def test_long_names_are_cut_on_the_page_only(tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    store = in_memory_store(images, source="x", names=[f"{index}{'n' * 4000}" for index in range(12)])
    text = page_text([audit(store, store)], tmp_path)
    assert "n" * 200 not in text and "n" * 150 + "…" in text


def test_a_matched_picture_is_the_view_that_the_search_found(reports):
    report = reports[0]
    index = int(np.flatnonzero(report.pairs["orbit_transform"] == "flip")[0])
    nearest = int(report.pairs["orbit_train_index"][index])
    made, original, matched = load(report, [("generated", index), ("train", nearest), ("matched", nearest, "flip")])
    np.testing.assert_array_equal(matched, made)
    np.testing.assert_array_equal(original, report.train.images[nearest])
