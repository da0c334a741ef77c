"""Speed and memory of the neighbour search, against what else this machine could do it with. Prints a table and JSON.

Everything runs in processes of its own, one after the other, on the same data: G queries and N references as .npy
files that are memory-mapped. Rates are 2·G·N·D operations over the seconds of the whole search, so they compare with
the matrix product alone. Usage:

    python benchmarks/neighbours.py compare [--images FOLDER]   # as `unrote data get cifar10 --to FOLDER` writes it
    python benchmarks/neighbours.py scaling
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

NUM = 50
SIZES = (4096, 50_000, 3072)
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)  # of CIFAR-10, as usual; three scales, so no grid of 8 bits
STD = np.array([0.2470, 0.2435, 0.2616], np.float32)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "scaling", "child"])
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--images", type=Path, help="folder of .npz with 54,096 images or more; random pixels without it"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "child":
        print(json.dumps(child(*options.arguments)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = compare if options.what == "compare" else scaling
        results = run(Path(folder), options)
    report = {"what": options.what, "machine": machine(options.threads), "results": results}
    target = options.out / f"neighbours-{options.what}"
    target.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    target.with_suffix(".md").write_text(table(report))
    print(table(report))


def machine(threads: int) -> dict[str, object]:
    """What the numbers hold for."""
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processor": model[0],
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def measured(threads: int, *arguments: object) -> dict[str, float]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "child", *map(str, arguments), "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    print(*arguments[:1], result, file=sys.stderr)
    return result


def compare(folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    """One size, every way, three times in alternation (a disturbance does not hit one way alone); medians."""
    measured(options.threads, "prepare", folder, options.images or "")
    ways = [("sgemm", "normal"), ("images", "pixels8")]
    ways += [(way, name) for name in ("pixels", "normal") for way in ("features", "faiss", "cdist")]
    runs = [(way, name, measured(options.threads, way, folder, name)) for _ in range(3) for way, name in ways]
    results: list[dict[str, object]] = []
    for way, name in ways:
        results.append({"way": way, "data": name, **middle([r for w, n, r in runs if (w, n) == (way, name)])})
    seconds = {(result["way"], result["data"]): float(str(result["seconds"])) for result in results}
    for result in results:
        if result["way"] in ("images", "features"):
            data = "pixels" if result["way"] == "images" else result["data"]
            rivals = {"sgemm": ("sgemm", "normal"), "faiss": ("faiss", data), "cdist": ("cdist", data)}
            for rival, key in rivals.items():
                result[f"times_faster_than_{rival}"] = seconds[key] / float(str(result["seconds"]))
    return results


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The run of median time, and the range of times and the load of all."""
    ordered = sorted(runs, key=lambda run: run["seconds"])
    times = {"fastest": ordered[0]["seconds"], "slowest": ordered[-1]["seconds"]}
    return {**ordered[len(ordered) // 2], **times, "load": max(run["load"] for run in runs)}


def prepare(folder: Path, images: str) -> dict[str, float]:
    """Write the data of ``compare``: CIFAR-10 in 8 bits and normalised (or random pixels), and normal numbers."""
    count, total, values = SIZES
    random = np.random.default_rng(0)
    if images:
        parts = [np.load(file, allow_pickle=False)["images"] for file in sorted(Path(images).glob("*.npz"))]
        pixels = np.concatenate(parts)[random.permutation(sum(map(len, parts)))[: count + total]].reshape(-1, values)
    else:
        pixels = random.integers(0, 256, (count + total, values), dtype=np.uint8)
    for part, rows in (("queries", slice(count)), ("references", slice(count, None))):
        np.save(folder / f"pixels8-{part}.npy", pixels[rows].reshape(-1, 32, 32, 3))
        normalised = (pixels[rows].reshape(-1, 1024, 3) / np.float32(255) - MEAN) / STD
        np.save(folder / f"pixels-{part}.npy", normalised.reshape(-1, values))
        np.save(folder / f"normal-{part}.npy", random.standard_normal((len(normalised), values), dtype=np.float32))
    return {}


def scaling(folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    """2,048 queries, D = 512, N from 10⁴ to 10⁶ float32 rows on disk; and 8-bit images of 512 values."""
    count, values, sizes = 2048, 512, (10_000, 100_000, 1_000_000)
    results: list[dict[str, object]] = []
    random = np.random.default_rng(0)
    basis = random.standard_normal((32, values), dtype=np.float32)
    for total in sizes:
        for part, rows in (("queries", count), ("references", total)):
            floats = np.lib.format.open_memmap(folder / f"normal-{part}.npy", "w+", np.float32, (rows, values))
            pixels = np.lib.format.open_memmap(folder / f"pixels8-{part}.npy", "w+", np.uint8, (rows, 16, 32, 1))
            for start in range(0, rows, 10_000):
                stop = min(start + 10_000, rows)
                floats[start:stop] = random.standard_normal((stop - start, 32), dtype=np.float32) @ basis
                pixels[start:stop] = np.clip(floats[start:stop] * 12 + 128, 0, 255).reshape(-1, 16, 32, 1)
        for way, name in (("images", "pixels8"), ("features", "normal")):
            run = middle([measured(options.threads, way, folder, name) for _ in range(3)])
            for clock in ("seconds", "cpu_seconds"):
                run[f"nano{clock}_per_pair"] = run[clock] / (count * total) * 1e9
            results.append({"way": way, "N": total, "G": count, "D": values, **run})
    return results


def child(way: str, folder: str, name: str) -> dict[str, float]:
    """One measurement in this process: seconds, rate, peak memory, the machine's load before, and a checksum."""
    if way == "prepare":
        return prepare(Path(folder), name)
    load = round(os.getloadavg()[0], 1)
    queries = np.load(Path(folder) / f"{name}-queries.npy", mmap_mode="r")
    references = np.load(Path(folder) / f"{name}-references.npy", mmap_mode="r")
    run = {"sgemm": sgemm, "images": images, "features": features, "faiss": faiss, "cdist": cdist}[way]
    result = run(queries, references)
    work = 2 * len(queries) * len(references) * int(np.prod(queries.shape[1:]))
    rate = round(work / result["seconds"] / 1e9, 1)
    return {"gflops": rate, "peak_rss_mib": peak_rss_mib(), "load": load, **result}


class Clock:
    """Seconds that passed, and seconds the processors worked (on a busy machine only these compare)."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        """Since the start."""
        now = time.perf_counter(), time.process_time()
        return {"seconds": round(now[0] - self.start[0], 4), "cpu_seconds": round(now[1] - self.start[1], 4)}


def peak_rss_mib() -> int:
    """The most memory this program ever held. (ru_maxrss would count that of the parent before exec, too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def sgemm(queries: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The fastest float32 product of this size there is here: best block of several shapes, nothing else done."""
    best: dict[str, float] = {"seconds": float("inf"), "cpu_seconds": float("inf")}
    left = torch.from_numpy(np.array(queries))
    for block in (2048, 4096, 8192):
        right = torch.from_numpy(np.array(references[:block])).T
        out = torch.empty(len(left), block)
        for columns in (right, right.contiguous()):
            for _ in range(4):
                clock = Clock()
                torch.mm(left, columns, out=out)
                spent = {name: value * len(references) / block for name, value in clock.read().items()}
                best = {name: min(value, spent[name]) for name, value in best.items()}
    return best


def images(queries: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Ours, of 8-bit images."""
    from unrote.neighbours.images import nearest_images

    nearest_images(queries[:64], references[:4096], NUM)  # libraries load, the products are checked
    clock = Clock()
    found = nearest_images(queries, references, NUM)
    return {**clock.read(), "checksum": int(found.indices.sum())}


def features(queries: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """Ours, of float32 rows."""
    from unrote.neighbours.features import nearest_features

    nearest_features(queries[:64], references[:4096], NUM)
    clock = Clock()
    found = nearest_features(queries, references, NUM)
    return {**clock.read(), "checksum": int(found.indices.sum()), "searched_again": found.searched_again}


def faiss(queries: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """IndexFlatL2 over all rows in memory; filling the index is not counted."""
    import faiss as library

    library.omp_set_num_threads(torch.get_num_threads())
    index = library.IndexFlatL2(references.shape[1])
    index.add(np.array(references))
    rows = np.array(queries)
    index.search(rows[:64], NUM)
    clock = Clock()
    _, found = index.search(rows, NUM)
    return {**clock.read(), "checksum": int(found.sum())}


def cdist(queries: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """What is written by hand: torch.cdist of 1,024 queries with all references, then topk."""
    everything = torch.from_numpy(np.array(references))
    clock, total = Clock(), 0
    for first in range(0, len(queries), 1024):
        distances = torch.cdist(torch.from_numpy(np.array(queries[first : first + 1024])), everything)
        total += int(distances.topk(NUM, dim=1, largest=False).indices.sum())
    return {**clock.read(), "checksum": total}


def table(report: dict[str, object]) -> str:
    """The results in Markdown."""
    rows: list[dict[str, object]] = report["results"]  # type: ignore[assignment]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "checksum"))
    lines = [f"`{json.dumps(report['machine'])}`", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append(
            "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
