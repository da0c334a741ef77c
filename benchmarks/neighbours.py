"""Speed and memory of the neighbour search, against what else this machine could do it with. Prints a table and JSON.

Everything runs in processes of its own, one after the other, on the same data: G queries and N references as .npy
files that are memory-mapped. Rates are 2·G·N·D operations over the seconds of the whole search, so they compare with
the matrix product alone. Usage:

    python benchmarks/neighbours.py compare --out FOLDER [--images cifar10] [--threads 2]
    python benchmarks/neighbours.py scaling --out FOLDER [--threads 2]
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
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--images", type=Path, help="uint8 .npy [≥ 54096, H, W, C]: real images; random ones without it"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "child":
        print(json.dumps(child(*options.arguments)))
        return
    with tempfile.TemporaryDirectory(dir=options.out) as folder:
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
    """One size, every way, three times in alternation (a disturbance does not hit one way alone); the best of each."""
    count, total, values = SIZES
    random = np.random.default_rng(0)
    if options.images:
        images = np.load(options.images, mmap_mode="r")
        images = images[random.permutation(len(images))[: count + total]].reshape(count + total, -1)
    else:
        images = random.integers(0, 256, (count + total, values), dtype=np.uint8)
    normalised = ((images.reshape(-1, 1024, 3) / np.float32(255) - MEAN) / STD).reshape(count + total, values)
    sets = {
        "pixels8": images.reshape(-1, 32, 32, 3),
        "pixels": normalised,
        "normal": random.standard_normal((count + total, values), dtype=np.float32),
    }
    for name, rows in sets.items():
        np.save(folder / f"{name}-queries.npy", rows[:count])
        np.save(folder / f"{name}-references.npy", rows[count:])
    del images, normalised, sets
    ways = [("sgemm", "normal"), ("images", "pixels8")]
    ways += [(way, name) for name in ("pixels", "normal") for way in ("features", "faiss", "cdist")]
    runs = [(way, name, measured(options.threads, way, folder, name)) for _ in range(3) for way, name in ways]
    results = []
    for way, name in ways:
        best = min((result for w, n, result in runs if (w, n) == (way, name)), key=lambda result: result["seconds"])
        results.append({"way": way, "data": name, **best})
    return results


def scaling(folder: Path, options: argparse.Namespace) -> list[dict[str, object]]:
    """512 queries, D = 512, N from 10⁴ to 10⁶ float32 rows on disk; and 8-bit images of 512 values."""
    count, values, results = 512, 512, []
    random = np.random.default_rng(0)
    basis = random.standard_normal((32, values), dtype=np.float32)
    for total in (10_000, 100_000, 1_000_000):
        shape = (total, values)
        rows = np.lib.format.open_memmap(folder / "normal-references.npy", "w+", np.float32, shape)
        pixels = np.lib.format.open_memmap(folder / "pixels8-references.npy", "w+", np.uint8, (total, 16, 32, 1))
        for start in range(0, total, 10_000):
            block = random.standard_normal((10_000, 32), dtype=np.float32) @ basis
            rows[start : start + 10_000] = block
            pixels[start : start + 10_000] = np.clip(block * 12 + 128, 0, 255).reshape(-1, 16, 32, 1)
        rows.flush()
        np.save(folder / "normal-queries.npy", random.standard_normal((count, 32), dtype=np.float32) @ basis)
        queries = random.standard_normal((count, 32), dtype=np.float32) @ basis
        np.save(
            folder / "pixels8-queries.npy", np.clip(queries * 12 + 128, 0, 255).astype(np.uint8).reshape(-1, 16, 32, 1)
        )
        for way, name in (("images", "pixels8"), ("features", "normal")):
            best = min((measured(options.threads, way, folder, name) for _ in range(3)), key=lambda run: run["seconds"])
            best["nanoseconds_per_pair"] = best["seconds"] / (count * total) * 1e9
            results.append({"way": way, "N": total, "G": count, "D": values, **best})
    return results


def child(way: str, folder: str, name: str) -> dict[str, float]:
    """One measurement in this process: seconds, rate, peak memory, and a checksum."""
    queries = np.load(Path(folder) / f"{name}-queries.npy", mmap_mode="r")
    references = np.load(Path(folder) / f"{name}-references.npy", mmap_mode="r")
    run = {"sgemm": sgemm, "images": images, "features": features, "faiss": faiss, "cdist": cdist}[way]
    seconds, result = run(queries, references)
    work = 2 * len(queries) * len(references) * int(np.prod(queries.shape[1:]))
    return {
        "seconds": round(seconds, 4),
        "gflops": round(work / seconds / 1e9, 1),
        "peak_rss_mib": peak_rss_mib(),
        **result,
    }


def peak_rss_mib() -> int:
    """The most memory this program ever held. (ru_maxrss would count that of the parent before exec, too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM"))


def sgemm(queries: np.ndarray, references: np.ndarray) -> tuple[float, dict[str, float]]:
    """The fastest float32 product of this size there is here: best block of several shapes, nothing else done."""
    best = float("inf")
    for block in (2048, 4096, 8192):
        left, right = torch.from_numpy(np.array(queries)), torch.from_numpy(np.array(references[:block])).T.contiguous()
        out = torch.empty(len(left), block)
        for columns in (right, right.T.contiguous().T):
            for _ in range(4):
                start = time.perf_counter()
                torch.mm(left, columns, out=out)
                best = min(best, (time.perf_counter() - start) / block)
    return best * len(references), {}


def images(queries: np.ndarray, references: np.ndarray) -> tuple[float, dict[str, float]]:
    """Ours, of 8-bit images."""
    from unrote.neighbours.images import nearest_images

    nearest_images(queries[:64], references[:4096], NUM)  # libraries load, the products are checked
    start = time.perf_counter()
    found = nearest_images(queries, references, NUM)
    return time.perf_counter() - start, {"checksum": int(found.indices.sum())}


def features(queries: np.ndarray, references: np.ndarray) -> tuple[float, dict[str, float]]:
    """Ours, of float32 rows."""
    from unrote.neighbours.features import nearest_features

    nearest_features(queries[:64], references[:4096], NUM)
    start = time.perf_counter()
    found = nearest_features(queries, references, NUM)
    seconds = time.perf_counter() - start
    return seconds, {"checksum": int(found.indices.sum()), "searched_again": found.searched_again}


def faiss(queries: np.ndarray, references: np.ndarray) -> tuple[float, dict[str, float]]:
    """IndexFlatL2 over all rows in memory; filling the index is not counted."""
    import faiss as library

    library.omp_set_num_threads(torch.get_num_threads())
    index = library.IndexFlatL2(references.shape[1])
    index.add(np.array(references))
    rows = np.array(queries)
    index.search(rows[:64], NUM)
    start = time.perf_counter()
    _, found = index.search(rows, NUM)
    return time.perf_counter() - start, {"checksum": int(found.sum())}


def cdist(queries: np.ndarray, references: np.ndarray) -> tuple[float, dict[str, float]]:
    """What is written by hand: torch.cdist of 1,024 queries with all references, then topk."""
    everything = torch.from_numpy(np.array(references))
    start, total = time.perf_counter(), 0
    for first in range(0, len(queries), 1024):
        distances = torch.cdist(torch.from_numpy(np.array(queries[first : first + 1024])), everything)
        total += int(distances.topk(NUM, dim=1, largest=False).indices.sum())
    return time.perf_counter() - start, {"checksum": total}


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
