"""When a monitored training has gone too far: ``mq@0.5 > 0.01``."""

import re
from dataclasses import dataclass

MONITORED = ("mq", "mq-squared", "mq-orbit", "mq-orbit-squared", "exact")
"""What can be measured on pixels alone while training; named as in the limits of an audit."""


@dataclass(frozen=True)
class StopRule:
    """Training has gone too far when more than a share of the samples lies beyond a threshold.

    Attributes:
        measure: one of :data:`MONITORED`.
        threshold: of the neighbour ratio, in (0, 1]; None for ``exact``.
        greatest: the share that is still allowed, in [0, 1).
    """

    measure: str
    threshold: float | None
    greatest: float

    @property
    def label(self) -> str:
        """As it is written: ``mq@0.5``."""
        return self.measure if self.threshold is None else f"{self.measure}@{self.threshold:g}"


def parse_stop_rule(text: str) -> StopRule:
    """``mq@0.5 > 0.01`` as a rule.

    Raises:
        ValueError: it does not follow the grammar, or a number is out of range.
    """
    number = r"(\d+(?:\.\d*)?(?:[eE]-?\d+)?|\.\d+)"
    match = re.fullmatch(rf"([a-z-]+)(?:@{number})?\s*>\s*{number}", text.strip())
    if match is None or match[1] not in MONITORED or (match[1] == "exact") is not (match[2] is None):
        raise ValueError(f"write MEASURE@RATIO > SHARE such as mq@0.5 > 0.01, MEASURE one of {', '.join(MONITORED)}")
    rule = StopRule(match[1], None if match[2] is None else float(match[2]), float(match[3]))
    if rule.threshold is not None and not 0 < rule.threshold <= 1:
        raise ValueError(f"the ratio lies in (0, 1], not at {rule.threshold:g}")
    if rule.greatest >= 1:
        raise ValueError(f"{rule.greatest:g} is no share below 1; 1 % is 0.01")
    return rule
