"""What FSDP2 would do for a team: two processes on a CPU with gloo, weights whole in each or held in parts.

No part of training, which has no such option (docs/scaling.md says why). The network is of the default kind, a step
is noise against noise on halves of a batch of 8. Measured: bytes of weights, gradients and moments in each process; how
far weights are from those of one process after three steps; whether the first process can predict alone while all have
the weights whole; whether weights and moments go out to one process and come back tensor by tensor.

    python benchmarks/sharded_weights.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from unrote.config import load_config
from unrote.files import write_json
from unrote.models.denoiser import build_unet

RESULTS = Path(__file__).parent / "results" / "sharded_weights.json"
CHANNELS, SIDE, BATCH, STEPS = [128, 192], 16, 8, 3


def network() -> Any:
    """The same in every process."""
    torch.manual_seed(0)
    config = load_config(method="standard", overrides={"model.block_out_channels": CHANNELS}).model
    return build_unet(config, resolution=SIDE, channels=3, num_classes=None)


def shard(model: Any, mesh: DeviceMesh) -> list[FSDPModule]:
    """Hold the blocks' weights in parts, and then the rest."""
    blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
    return [fully_shard(part, mesh=mesh) for part in (*blocks, model)]


def train(model: nn.Module, mine: slice, members: int) -> torch.optim.Optimizer:
    """A few steps on ``mine`` of each batch; FSDP takes the mean of what its members have."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(step)
        images, noise = torch.randn(2, BATCH, 3, SIDE, SIDE, generator=draw)
        times = torch.randint(1000, (BATCH,), generator=draw)
        errors = (model(images[mine], times[mine]).sample - noise[mine]).square().mean((1, 2, 3))
        optimizer.zero_grad()
        (errors.sum() * members / BATCH).backward()
        optimizer.step()
    return optimizer


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, gradients and moments in this process."""
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return sum(local(t).nbytes for p in model.parameters() for t in (p, p.grad) if t is not None) + sum(
        local(value).nbytes for value in moments
    )


def local(tensor: Tensor) -> Tensor:
    """What of it is here."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Weights and moments, in the order of the weights."""
    return [t for p in model.parameters() for t in (p.data, *optimizer.state[p].values())]


def member(out: Path) -> None:
    """What each process does."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    alone = network()
    whole = held(alone, train(alone, slice(None), 1))
    mesh, model = DeviceMesh("cpu", list(range(size))), network()
    parts = shard(model, mesh)
    optimizer = train(model, slice(BATCH * rank // size, BATCH * (rank + 1) // size), size)
    found: dict[str, Any] = {"whole_bytes": whole, "held_bytes": held(model, optimizer)}

    # Out: the first process alone keeps what all gather. In: it alone has what all then hold parts of.
    kept = []
    for tensor in states(model, optimizer):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        kept.append(full.clone() if rank == 0 else torch.zeros_like(full))
    weights = [tensor.full_tensor() for tensor in model.parameters()]
    found["difference"] = max(
        float((one - other.data).abs().max()) for one, other in zip(weights, alone.parameters(), strict=True)
    )
    before = [local(tensor).clone() for tensor in states(model, optimizer)]
    for tensor, full in zip(states(model, optimizer), kept, strict=True):
        if isinstance(tensor, DTensor):
            local(tensor).zero_()
            tensor.copy_(distribute_tensor(full, mesh, tensor.placements))
    same = zip(before, states(model, optimizer), strict=True)
    found["back_as_it_was"] = all(torch.equal(one, local(other)) for one, other in same)

    # Alone: all have the weights whole for a while, and the first predicts as often as it likes.
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    found["predictions"] = 0
    if rank == 0:
        with torch.no_grad():
            for _ in range(5):
                prediction = model(torch.zeros(2, 3, SIDE, SIDE), torch.zeros(2)).sample
                found["predictions"] += int(prediction.isfinite().all())
    dist.barrier()
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(True, recurse=False)
    found["held_after_bytes"] = held(model, optimizer)
    write_json(out / f"rank-{rank}.json", found)
    dist.destroy_process_group()


def main() -> None:
    """Measure, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--member", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.member:
        member(arguments.member)
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--member", folder], check=True, timeout=600, env=environment)
        ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank-*.json"))]
    result = {"torch": torch.__version__, "parameters": sum(p.numel() for p in network().parameters()), "ranks": ranks}
    write_json(RESULTS, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
