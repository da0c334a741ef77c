"""The README's table of methods is made from the results that are committed."""

import json
from pathlib import Path

from launching import program

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_the_readmes_table_is_that_of_the_committed_results():
    assert program("tools/readme_table").MARKED.search(README)[2].startswith("benchmarks/results/")
    assert program("tools/readme_table").rendered(README) == README


def test_other_results_make_another_table(tmp_path):
    name = program("tools/readme_table").MARKED.search(README)[2]
    result = json.loads((ROOT / name).read_text("utf-8"))
    for cell in result["cells"]:
        cell["points"][-1]["memorization"]["orbit"]["fraction"] = 0.123
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(result))
    made = program("tools/readme_table").rendered(README, tmp_path)
    # One method at least has a single seed, whose number has no interval.
    assert "| 1 | 12.3 % |" in made and "12.3 %" not in README
    assert made.split("<!-- /study -->")[1] == README.split("<!-- /study -->")[1]
