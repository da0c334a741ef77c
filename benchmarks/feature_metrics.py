"""What metrics on features say when a known share of the generated images are copies.

In place of generated images: real images that were not trained on, a share of them replaced by copies of training
images with Gaussian noise of 3 % of the range. A model that copies nothing and is perfect otherwise is the first row.

    python benchmarks/feature_metrics.py cifar10:train cifar10:test [--encoder random-conv] [--train 10000]
"""

import argparse
from typing import Any

import numpy as np

import unrote
from unrote.auditing.quality import subsample
from unrote.auditing.spaces import measure_space
from unrote.encoders import load_encoder

SHARES = (0.0, 0.02, 0.1, 0.5, 1.0)


def main() -> None:
    """Print one row per share of copies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train_data")
    parser.add_argument("other_data")
    parser.add_argument("--encoder", default="random-conv")
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--holdout", type=int, default=4000)
    parser.add_argument("--generated", type=int, default=1000)
    arguments = parser.parse_args()
    encoder = load_encoder(arguments.encoder)
    train, other = (
        unrote.open_images(data, resolution=None).images for data in (arguments.train_data, arguments.other_data)
    )
    train = train[subsample(len(train), arguments.train, 0, "train")]
    order = np.random.default_rng(0).permutation(len(other))
    holdout = other[np.sort(order[: arguments.holdout])]
    fresh = other[np.sort(order[arguments.holdout :][: arguments.generated])]
    train_features, holdout_features = encoder(train), encoder(holdout)
    for share in SHARES:
        generated = with_copies(fresh, train, share)
        space = measure_space(
            encoder, encoder(generated), train_features, holdout_features, identity=np.arange(len(train)), seed=0
        )
        print(f"copies {share:4.0%}  " + "  ".join(cells(space.summary)), flush=True)


def with_copies(fresh: np.ndarray, train: np.ndarray, share: float) -> np.ndarray:
    """``fresh`` images, the first of them replaced by noised training images."""
    random = np.random.default_rng(1)
    count = round(share * len(fresh))
    chosen = random.choice(len(train), count, replace=False)
    copies = np.clip(train[chosen] + random.normal(0, 0.03 * 255, (count, *train.shape[1:])), 0, 255).round()
    return np.concatenate([copies.astype(np.uint8), fresh[count:]])


def cells(summary: dict[str, Any]) -> list[str]:
    """Name, value and interval of what was measured."""
    generalization, quality = summary["generalization"], summary["quality"]
    found = {**quality["generated"], "C_T": generalization["c_t"], "FLD excess": generalization["fld"]["excess"]}
    found["FLD gap"] = generalization["fld"]["gap"]
    rows = {"AuthPct": summary["authenticity"]["authpct"], "AuthPct unseen": summary["authenticity"]["unseen"]}
    if summary["similarity"] is not None and summary["similarity"]["calibrated"] is not None:
        rows["above"] = summary["similarity"]["calibrated"]["above"]
    found |= {name: {"value": row["fraction"], "interval": row["interval"]} for name, row in rows.items()}
    return [
        f"{name} {row['value']:.3g} [{row['interval'][0]:.3g}, {row['interval'][1]:.3g}]"
        for name, row in found.items()
        if row is not None
    ]


if __name__ == "__main__":
    main()
