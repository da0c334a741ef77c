"""IET and AGC in a training loop of your own: the model, the optimizer and the data set stay yours.

    python examples/own_loop.py

Three objects are added to an ordinary loop: a ledger (what was seen of each image), a gate (skips images whose loss is
abnormally low) and an ensemble (one proxy per shard, averaged after each round).
"""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import unrote

ROUNDS, EPOCHS_PER_ROUND, BATCH = 3, 2, 16


class Stripes(Dataset):
    """Your data set: any map-style one will do. The ensemble's shards add the key "index" to its items."""

    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(0)
        phases = torch.rand(count, 3, 1, 1, generator=draw)
        waves = torch.linspace(0, 2, 16).view(1, 1, 1, 16)
        self.images = torch.sin(2 * torch.pi * (waves + phases)).expand(-1, -1, 16, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[index]}


def main() -> None:
    torch.manual_seed(0)
    dataset = Stripes(64)
    model = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = DDPMScheduler(num_train_timesteps=1000)

    ledger = unrote.Ledger(len(dataset))
    # With few images, pool the timesteps into few bins: a bin that was never visited never skips.
    bank = unrote.LossBank(1000, bins=10, warm_start=True)
    gate = unrote.LossGate(num_timesteps=1000, skip_ratio=0.8, bank=bank, ledger=ledger)
    ensemble = unrote.ShardEnsemble(model, optimizer, dataset, num_shards=2, gate=gate)

    for number in range(ROUNDS):
        losses = []
        for shard in ensemble.round():  # proxy k is live inside; the proxies are averaged when the loop ends
            loader = DataLoader(shard, BATCH, shuffle=True)
            for _ in range(EPOCHS_PER_ROUND):
                for batch in loader:
                    noise = torch.randn_like(batch["image"])
                    t = torch.randint(1000, (len(noise),))
                    prediction = model(schedule.add_noise(batch["image"], noise, t), t).sample
                    # One loss per sample, not one per batch: the gate judges each.
                    per_sample = F.mse_loss(prediction, noise, reduction="none").mean((1, 2, 3))
                    gate(per_sample, t, batch["index"]).backward()
                    if gate.any_kept():
                        optimizer.step()
                    optimizer.zero_grad()
                    losses.append(per_sample.detach().mean().item())
        print(f"round {number + 1}: mean loss {sum(losses) / len(losses):.3f}")

    columns = ledger.columns()
    print(f"{columns['skips'].sum()} of {columns['visits'].sum()} visits were skipped")
    print("most skipped images:", columns["skips"].argsort()[::-1][:5].tolist())


if __name__ == "__main__":
    main()
