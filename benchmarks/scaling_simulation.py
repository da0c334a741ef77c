"""What a round costs from one process to thousands of shards: computing, exchanging, waiting, failing.

Simulated, not run: W processes with one proxy each (or K / W), every one at its own speed, which then meet and average
as :mod:`unrote.training.distributed` does: rank 0 receives every proxy of the others one after another, adds it, and
broadcasts the average. What a proxy costs to add and to receive and what a checkpoint takes to write are measured
(``benchmarks/distributed.py averaging checkpoints``); the time of a step, the network, how far machines are apart in
speed and how often they fail are assumptions, listed in the result.
Beside it, what a ring all-reduce would take, which does not add in a fixed order and is not what is implemented.

    python benchmarks/scaling_simulation.py
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unrote.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
ROUNDS = 200


@dataclass(frozen=True)
class Job:
    """What is trained. All of it is assumed but the parameters."""

    name: str
    parameters: float
    images_per_shard: int
    local_epochs: float
    batch_size: int
    step_seconds: float

    @property
    def steps(self) -> float:
        """Of a proxy in a round."""
        return self.images_per_shard * self.local_epochs / self.batch_size

    @property
    def averaged_bytes(self) -> float:
        """Weights and their moving average in float32."""
        return 8 * self.parameters


@dataclass(frozen=True)
class Cluster:
    """Where. All of it is assumed but what adding, receiving and writing cost.

    Attributes:
        bytes_per_second: of one process's network, either way.
        add_seconds_per_byte: reading a proxy and adding it in float64: measured.
        receive_seconds_per_byte: what one process takes to receive or send, however fast the network: measured.
        spread: standard deviation of the logarithm of a process's speed, drawn anew each round.
        stall_chance: that a process stands still once in a round, such as for a slow disk or a neighbour's job.
        stall_seconds: how long.
        hours_between_failures: of one process.
        restart_seconds: until all are running again.
        checkpoint_seconds: of one checkpoint, in which each process writes one proxy: measured, for a job's size.
    """

    bytes_per_second: float
    add_seconds_per_byte: float
    receive_seconds_per_byte: float
    checkpoint_seconds: float
    spread: float = 0.03
    stall_chance: float = 0.01
    stall_seconds: float = 30.0
    hours_between_failures: float = 2000.0
    restart_seconds: float = 180.0


def round_of(job: Job, cluster: Cluster, shards: int, world: int, seed: int) -> dict[str, float]:
    """A round's parts in seconds, mean of :data:`ROUNDS` simulated ones, and the share of it that is computing."""
    random = np.random.default_rng([seed, shards, world])
    blocks = np.array([len(block) for block in np.array_split(np.arange(shards), world)])
    speed = np.exp(random.normal(0.0, cluster.spread, (ROUNDS, world)))
    stalls = cluster.stall_seconds * (random.random((ROUNDS, world)) < cluster.stall_chance)
    busy = blocks * job.steps * job.step_seconds * speed + stalls
    computing, slowest = float(busy.mean()), float(busy.max(1).mean())
    size = job.averaged_bytes
    adding = shards * size * cluster.add_seconds_per_byte
    sending = size * max(1 / cluster.bytes_per_second, cluster.receive_seconds_per_byte)
    gathering = (shards - int(blocks[0])) * sending
    broadcasting = math.ceil(math.log2(world)) * sending if world > 1 else 0.0
    total = slowest + adding + gathering + broadcasting
    # Sums of float64 travel twice around the ring.
    ring = slowest + (0.0 if world == 1 else 2 * 2 * sending * (world - 1) / world) + adding / world
    return {
        "shards": shards,
        "processes": world,
        "computing": computing,
        "waiting": slowest - computing,
        "gathering": gathering,
        "adding": adding,
        "broadcasting": broadcasting,
        "efficiency": computing / total,
        "efficiency_with_a_ring": computing / ring,
    }


def checkpointing(cluster: Cluster, world: int) -> dict[str, float]:
    """The interval that loses least (Young 1974), and the share of time lost to checkpoints, repeated work, restarts.

    One process that fails stops all, and all go on from the newest checkpoint.
    """
    between = cluster.hours_between_failures * 3600 / world
    interval = math.sqrt(2 * cluster.checkpoint_seconds * between)
    lost = cluster.checkpoint_seconds / interval + (interval / 2 + cluster.restart_seconds) / between
    return {"processes": world, "interval_minutes": interval / 60, "lost": lost / (1 + lost)}


def scenarios(cost: dict[str, float]) -> list[tuple[Job, Cluster, list[tuple[int, int]]]]:
    """What is simulated: shards and processes of each."""

    def on(bytes_per_second: float, job: Job) -> Cluster:
        # A proxy's file: weights, their moving average and two moments in float32.
        writing = 16 * job.parameters * cost["write"]
        return Cluster(bytes_per_second, cost["add"], cost["receive"], writing)

    cifar = Job("CIFAR-10 as in the papers, 35.7 M, 100 local epochs", 35.7e6, 5000, 100, 128, 0.1)
    short = Job("the same with 4 local epochs", 35.7e6, 5000, 4, 128, 0.1)
    large = Job("Stable Diffusion's UNet, 866 M, 40,000 images a shard, 1 local epoch", 866e6, 40_000, 1, 8, 0.5)
    few = [(10, 1), (10, 2), (10, 5), (10, 10)]
    many = [(n, n) for n in (1, 4, 16, 64, 256, 1024, 4096)]
    return [(cifar, on(1.25e9, cifar), few), (short, on(1.25e9, short), few), (large, on(25e9, large), many)]


def simulate(cost: dict[str, float], seed: int) -> dict[str, Any]:
    """Every scenario."""
    rows = [
        {
            "job": asdict(job) | {"steps_per_round": job.steps},
            "cluster": asdict(cluster),
            "rounds": [round_of(job, cluster, shards, world, seed) for shards, world in sizes],
        }
        for job, cluster, sizes in scenarios(cost)
    ]
    worlds, large = (1, 8, 64, 512, 4096), scenarios(cost)[-1][1]
    return {
        "seed": seed,
        "simulated_rounds": ROUNDS,
        "scenarios": rows,
        "failures": [checkpointing(large, world) for world in worlds],
    }


def table(result: dict[str, Any]) -> str:
    """As Markdown."""
    lines = []
    for scenario in result["scenarios"]:
        job, cluster = scenario["job"], scenario["cluster"]
        lines += [
            f"{job['name']}: {job['steps_per_round']:,.0f} steps of {job['step_seconds']:g} s a proxy and round, "
            f"{8 * job['parameters'] / 1e9:.2f} GB averaged, {cluster['bytes_per_second'] / 1e9:g} GB/s",
            "",
            "| K | W | computing | waiting | gathering | adding | broadcast | efficiency | with a ring |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in scenario["rounds"]:
            seconds = (row[name] for name in ("computing", "waiting", "gathering", "adding", "broadcasting"))
            cells = " | ".join(f"{value:,.1f} s" for value in seconds)
            lines.append(
                f"| {row['shards']:,} | {row['processes']:,} | {cells} | {row['efficiency']:.1%} | "
                f"{row['efficiency_with_a_ring']:.1%} |"
            )
        lines.append("")
    lines += ["| W | a checkpoint every | lost to failures |", "|---|---|---|"]
    lines += [
        f"| {row['processes']:,} | {row['interval_minutes']:,.0f} min | {row['lost']:.1%} |"
        for row in result["failures"]
    ]
    return "\n".join(lines) + "\n"


def measured_costs(path: Path) -> dict[str, float]:
    """Seconds per byte as benchmarks/distributed.py found.

    Processor time of adding and receiving; wall time, with the disk, of writing, hashing and reading back.
    """
    found = json.loads(path.read_text())
    averaging, written = found["averaging"], found["checkpoints"]["papers"]["one"]
    size, measured = 8 * averaging["parameters"], averaging["measured"]
    return {
        "add": measured["average_seconds_per_proxy"]["processor"] / size,
        # There, and the average back.
        "receive": measured["transport_seconds_per_proxy"]["processor"] / (2 * size),
        "write": written["wall"] / written["new_bytes"],
    }


def main() -> None:
    """Simulate and write the result with its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS / "distributed.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling_simulation.json")
    arguments = parser.parse_args()
    result = simulate(measured_costs(arguments.measured), arguments.seed)
    write_json(arguments.out, result)
    write_text(arguments.out.with_suffix(".md"), table(result))
    print(table(result))


if __name__ == "__main__":
    main()
