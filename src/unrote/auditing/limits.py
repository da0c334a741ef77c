"""Limits for continuous integration: ``mq@0.5=0.01`` fails an audit that finds more than 1 % near-copies."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from unrote.auditing.intervals import fraction
from unrote.auditing.memorization import Definition
from unrote.errors import InputError
from unrote.limits import StopRule

if TYPE_CHECKING:
    from unrote.auditing.result import AuditReport

MEASURES: dict[str, tuple[str, Definition]] = {
    "mq": ("plain", "l2"),
    "mq-squared": ("plain", "squared-l2"),
    "mq-orbit": ("orbit", "l2"),
    "mq-orbit-squared": ("orbit", "squared-l2"),
}
SIMILARITY = "similarity"  # above the threshold, not below
GRAMMAR = f"MEASURE@THRESHOLD=FRACTION with MEASURE one of {', '.join([*MEASURES, SIMILARITY])}, or exact=FRACTION"


class Limit(StopRule):
    """Of an audit: ``greatest`` may be 1, and ``measure`` ``similarity`` of copy detection, above the threshold."""

    def measured(self, report: "AuditReport") -> dict[str, Any]:
        """``count``, ``total``, ``fraction`` and ``interval`` of the report, whatever thresholds its tables have."""
        if self.threshold is None:
            row: dict[str, Any] = report.summary["exact_copies"]["orbit"]
            return row
        if self.measure == SIMILARITY:
            key = report.summary["copy_space"]
            if key is None:
                raise InputError(f"--fail-above {self.label} needs copy detection: add --encoder sscd")
            similar = report.pairs[f"{key}_similarity"]
            return fraction(int((similar > self.threshold).sum()), len(similar))
        ratios = report.curves[(*MEASURES[self.measure], "train")]
        return fraction(int((ratios < self.threshold).sum()), len(ratios))


def parse_limit(text: str) -> Limit:
    """``mq@0.5=0.01`` as a limit.

    Raises:
        InputError: it does not follow the grammar, or a number is out of range.
    """
    match = re.fullmatch(r"([a-z-]+)(?:@([0-9.eE+-]+))?=([0-9.eE+-]+)", text.strip())
    if (
        match is None
        or (match[1] == "exact") is not (match[2] is None)
        or match[1] not in (*MEASURES, SIMILARITY, "exact")
    ):
        raise InputError(f"--fail-above {text!r} is not {GRAMMAR}, such as mq@0.5=0.01")
    try:
        threshold, greatest = None if match[2] is None else float(match[2]), float(match[3])
    except ValueError:
        raise InputError(f"--fail-above {text!r}: not a number; write it as mq@0.5=0.01") from None
    if threshold is not None and not 0 < threshold <= 1:
        raise InputError(f"--fail-above {text!r}: the threshold lies in (0, 1], not at {threshold:g}")
    if not 0 <= greatest <= 1:
        raise InputError(f"--fail-above {text!r}: {greatest:g} is no fraction in [0, 1]; 1 % is 0.01")
    return Limit(match[1], threshold, greatest)


def exceeded(report: "AuditReport", limits: Sequence[Limit]) -> list[str]:
    """One sentence for each limit that the report exceeds: the fraction itself, not its interval, is compared."""
    sentences = []
    for limit in limits:
        row = limit.measured(report)
        if row["fraction"] > limit.greatest:
            sentences.append(
                f"{limit.label} is {row['fraction']:.6g} ({row['count']:,} of {row['total']:,}), "
                f"above the limit of {limit.greatest:g}"
            )
    return sentences
