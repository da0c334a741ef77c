"""A LightningModule with automatic optimization."""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from shared import to_pixels


class Images(Dataset):
    def __init__(self, folder, resolution):
        self.paths = sorted(Path(folder).glob("**/*.png"))
        self.resolution = resolution

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return {"images": to_pixels(Image.open(self.paths[index]), self.resolution)}


class DiffusionModel(pl.LightningModule):
    def __init__(self, dataset, *, resolution, batch_size, timesteps=1000):
        super().__init__()
        self.model = UNet2DModel(
            sample_size=resolution, block_out_channels=(32, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        self.scheduler = DDPMScheduler(num_train_timesteps=timesteps)
        self.dataset, self.batch_size = dataset, batch_size

    def train_dataloader(self):
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True)

    def training_step(self, batch, batch_idx):
        images = batch["images"]
        noise = torch.randn_like(images)
        steps = torch.randint(self.scheduler.config.num_train_timesteps, (len(images),), device=self.device)
        noisy_images = self.scheduler.add_noise(images, noise, steps)
        residual = self.model(noisy_images, steps).sample
        loss = F.mse_loss(residual, noise)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-4)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.99)
        return [optimizer], [scheduler]


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_epochs", type=int, default=150)
    return parser.parse_args(argv)


def main(args):
    dataset = Images(args.data, args.resolution)
    model = DiffusionModel(dataset, resolution=args.resolution, batch_size=args.batch_size, timesteps=args.timesteps)
    trainer = pl.Trainer(
        max_epochs=args.max_epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=args.out,
    )  # fmt: skip
    trainer.fit(model)
    model.model.save_pretrained(args.out)


if __name__ == "__main__":
    main(parse_args())
