"""pairs.csv and summary.md: read back, harmless to spreadsheets and Markdown, complete."""

import csv
import io

import numpy as np
import pytest

from unrote.auditing import AuditReport, audit
from unrote.data import in_memory_store
from unrote.encoders import load_encoder
from unrote.report.exports import code, pairs_csv, summary_markdown

EVIL = 'a,b\n"c" | `d` <script>'


@pytest.fixture(scope="module")
def report() -> AuditReport:
    random = np.random.default_rng(0)
    train, fresh, unseen = (random.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8) for _ in range(3))
    fresh[:20] = train[:20]
    return audit(
        in_memory_store(fresh, source="g", names=[f"{index}{EVIL}" for index in range(40)]),
        in_memory_store(train, source="t", names=[f"{index}{EVIL}" for index in range(40)]),
        in_memory_store(unseen, source="h"),
        max_shift=1,
        false_positive_rate=0.1,
        encoders=[load_encoder(lambda images: images.reshape(len(images), -1).astype(np.float32) - 128)],
        ledger={"visits": np.full(40, 50), "skips": np.arange(40)},
    )


def test_pairs_csv_is_read_back_whole(report):
    rows = list(csv.DictReader(io.StringIO(pairs_csv(report))))
    assert len(rows) == 40 and list(rows[0]) == [*report.pairs, "ledger_visits", "ledger_skips"]
    assert rows[3]["orbit_train_name"] == f"3{EVIL}" and rows[3]["ledger_skips"] == "3"
    for column in ("ratio_squared_l2", "orbit_ratio_distinct", "custom_similarity"):
        assert [float(row[column]) for row in rows] == pytest.approx(report.pairs[column].tolist(), rel=1e-8)


def test_no_name_starts_a_formula():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    store = in_memory_store(images, source="x", names=["=HYPERLINK(1)", "-2"])
    names = [row["name"] for row in csv.DictReader(io.StringIO(pairs_csv(audit(store, store))))]
    assert names == ["'=HYPERLINK(1)", "'-2"]


def test_summary_markdown_has_the_numbers(report):
    text = summary_markdown(report)
    assert "| squared-l2, as they are | 0.33 | 50.0 %" in text and "(not an FID)" in text and "AuthPct" in text
    assert "Distinct training images that came back: 20" in text and "calibrated" in text and "Similarity (`" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.count("|") in (6, 9), line
    assert len(text.splitlines()) < 30


def test_summary_markdown_without_holdout_and_transforms():
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    store = in_memory_store(images, source="x")
    text = summary_markdown(audit(store, store, flip=False, max_shift=0, scales=(), brightness=()))
    assert "not measured" in text and "up to" not in text.split("| near-copies")[1].split("\n\n")[0]


def test_text_of_strangers_ends_neither_code_nor_cell():
    assert code(EVIL) == "`a,b \"c\" / 'd' <script>`"
