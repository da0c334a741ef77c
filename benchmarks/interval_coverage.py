"""How often do the 95 % intervals of metrics on features hold the truth? Repeated draws.

    python benchmarks/interval_coverage.py [--repetitions 400] [--images 500] [--dimensions 32]
    python benchmarks/interval_coverage.py --data cifar10:train cifar10:test [--repetitions 400] [--images 500]

The first draws Gaussian features, the second images of the first set and takes their random-conv features; the
reference is then 2,000 images of the second set.

The truth of a quality metric is its mean over the repetitions, each with other generated images of the same number, and
the same reference: this is what the interval claims to cover. C_T and the likelihood gap also draw other held-out (and,
for the gap, training) images. ``none`` generates from the distribution of the real images, ``shifted`` does not.
"""

import argparse

import numpy as np

import unrote
from unrote.auditing.frechet import Moments, frechet_with_influence
from unrote.auditing.generalization import likelihood_gap, measure_c_t
from unrote.auditing.intervals import mean_spread, squared_estimate
from unrote.auditing.kernel import KernelDistance
from unrote.auditing.manifold import Manifold, manifold_metrics
from unrote.encoders.random_conv import RandomConvEncoder
from unrote.neighbours.features import nearest_features


def main() -> None:
    """Print the coverage of each metric and the width of its interval over the spread of its values."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=400)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--dimensions", type=int, default=32)
    parser.add_argument("--data", nargs=2)
    arguments = parser.parse_args()
    if arguments.data:
        show("real", real_images(*arguments.data, arguments.repetitions, arguments.images))
        return
    for kind in ("none", "shifted"):
        show(kind, repetitions(kind, arguments.repetitions, arguments.images, arguments.dimensions))


def show(kind: str, found: dict[str, list[dict]]) -> None:
    """One line per metric."""
    for metric, rows in found.items():
        values = np.array([row["value"] for row in rows])
        low, high = np.array([row["interval"] for row in rows]).T
        truth = 0.0 if metric == "fld excess" and kind == "none" else values.mean()
        covered = ((low <= truth) & (truth <= high)).mean()
        width = ((high - low) / 2 / 1.96).mean() / values.std()
        print(f"{kind:8} {metric:18} truth {truth:9.4f}  coverage {covered:.3f}  error / spread {width:.2f}")


def frechet(generated: np.ndarray, reference: Moments) -> dict:
    """The row of the Fréchet distance."""
    value, influence = frechet_with_influence(generated, reference)
    return squared_estimate(value, mean_spread(influence))


def real_images(drawn: str, other: str, num: int, images: int) -> dict[str, list[dict]]:
    """Rows of the quality metrics over the repetitions."""
    encoder = RandomConvEncoder()
    features, reference = (encoder(unrote.open_images(data, resolution=None).images) for data in (drawn, other))
    reference = reference[:2000]
    moments, kernel, manifold = Moments.of(reference), KernelDistance(reference), Manifold(reference)
    random = np.random.default_rng(0)
    found: dict[str, list[dict]] = {}
    for _ in range(num):
        generated = features[random.choice(len(features), images, replace=False)]
        rows = {
            "frechet_distance": frechet(generated, moments),
            "kid": kernel.to(generated),
            **(manifold.metrics(generated) or {}),
        }
        for metric, row in rows.items():
            found.setdefault(metric, []).append(row)
    return found


def repetitions(kind: str, num: int, images: int, dimensions: int) -> dict[str, list[dict]]:
    """Every metric's rows over the repetitions."""
    shift, scale = (0.0, 1.0) if kind == "none" else (0.3, 1.2)
    spectrum = np.arange(1, dimensions + 1) ** -0.5
    random = np.random.default_rng(0)

    def real() -> np.ndarray:
        return (random.normal(size=(images, dimensions)) * spectrum).astype(np.float32)

    reference, train = real(), real()
    moments = Moments.of(reference)
    found: dict[str, list[dict]] = {}
    for repetition in range(num):
        generated = real() * np.float32(scale) + np.float32(shift) * spectrum.astype(np.float32)
        rows = {
            "frechet_distance": frechet(generated, moments),
            "kid": KernelDistance(reference).to(generated),
            **(manifold_metrics(generated, reference) or {}),
        }
        unseen = real()
        distances = tuple(nearest_features(part, train, 1).squared[:, 0] for part in (generated, unseen))
        rows["c_t"] = measure_c_t(generated, train, unseen, distances, seed=0) or {}
        if repetition < num // 4:  # slow
            rows["fld excess"] = (likelihood_gap(generated, real(), unseen, seed=0) or {})["excess"]
        for metric, row in rows.items():
            found.setdefault(metric, []).append(row)
    return found


if __name__ == "__main__":
    main()
