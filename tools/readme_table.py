"""Write the README's table of methods from a study's committed results.

    python tools/readme_table.py            # rewrites what stands between the marks
    python tools/readme_table.py --check    # exit code 1 if that would change it

The mark says which results: `<!-- study: benchmarks/results/study.json -->` … `<!-- /study -->`.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unrote.study.curves import mean_over_seeds
from unrote.study.run import frechet
from unrote.study.tables import number, percents

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- study: (\S+) -->\n).*?(<!-- /study -->)", re.DOTALL)
MIN_SEEDS = 3
COLUMNS = (
    "method",
    "seeds",
    "near-copies at the end",
    "distinct images copied",
    "Fréchet distance at the end",
    "at its best distance: near-copies ÷ early stopping's",
    "at a tenth of the copies: distance ÷ early stopping's",
    "CPU time ÷ ordinary",
)


def rendered(text: str, root: Path = ROOT) -> str:
    """``text`` with the table of each mark made anew from the file that it names, a path below ``root``."""
    return MARKED.sub(lambda found: found[1] + tables(json.loads((root / found[2]).read_text())) + found[3], text)


def tables(result: Mapping[str, Any]) -> str:
    """A table per regime in which there is something to compare ordinary training with."""
    parts = []
    for regime, summary in result["summary"].items():
        space = next(iter(summary["spaces"]))
        if len(summary["spaces"][space]["near-copies"]) == 1:
            continue
        about = result["study"]["regimes"][regime]["about"]
        lines = [f"**{regime}**: {about}\n", "| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        for method, row in summary["spaces"][space]["near-copies"].items():
            cells = [cell for cell in result["cells"] if (cell["regime"], cell["method"]) == (regime, method)]
            cost = shown(summary["costs"][method]["cpu_ratio"], number)
            lines.append("| " + " | ".join([method, str(row["seeds"]), *at_the_end(cells), *against(row), cost]) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n" + "\n".join(parts) + "\n"


def shown(estimate: Mapping[str, Any] | None, words: Callable[..., str], *digits: int) -> str:
    """Two seeds have an interval that says nothing: it is left out."""
    few = estimate is not None and estimate["seeds"] < MIN_SEEDS
    return words({**estimate, "interval": None} if few else estimate, *digits)


def at_the_end(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Share of near-copies, distinct images and distance of the last snapshot, with intervals over seeds."""
    last = [cell["points"][-1] for cell in cells]
    copies = [point["memorization"]["orbit"] for point in last]
    share, distinct, distance = (
        mean_over_seeds(values, 0, most)
        for values, most in (
            ([row["fraction"] for row in copies], 1),
            ([row["distinct"] for row in copies], np.inf),
            ([frechet(point) for point in last], np.inf),
        )
    )
    return [
        shown(share.to_dict(), percents),
        shown(distinct.to_dict(), number, 0),
        shown(distance.to_dict(), number, 1),
    ]


def against(row: Mapping[str, Any]) -> list[str]:
    """Memorization at equal quality, and quality at little memorization, over those of early stopping."""
    return [shown(row[key], number) for key in ("at_own_best_ratio", "distance_at_equal_memorization_ratio")]


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, say whether it would change")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    made = rendered(text)
    if not check:
        readme.write_text(made, "utf-8")
    return int(check and made != text)


if __name__ == "__main__":
    sys.exit(main())
