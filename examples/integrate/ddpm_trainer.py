"""A diffusion class that hands back a mean loss, and a trainer that cycles through the data for a number of steps.

The shape of the popular plain-PyTorch DDPM repositories: ``p_losses`` inside the model, ``train_num_steps``, gradient
accumulation by hand, and no epochs.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from shared import to_pixels


class Images(Dataset):
    def __init__(self, folder, image_size):
        self.paths = sorted(Path(folder).glob("**/*.png"))
        self.image_size = image_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return to_pixels(Image.open(self.paths[index]), self.image_size)


class GaussianDiffusion(nn.Module):
    def __init__(self, model, *, timesteps=1000):
        super().__init__()
        self.model = model
        self.num_timesteps = timesteps
        betas = torch.linspace(1e-4, 0.02, timesteps)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0))

    def q_sample(self, x_start, t, noise):
        alpha = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * x_start + (1 - alpha).sqrt() * noise

    def p_losses(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        model_out = self.model(self.q_sample(x_start, t, noise), t).sample
        loss = F.mse_loss(model_out, noise, reduction="none").flatten(1).mean(1)
        return loss.mean()

    def forward(self, img, *args, **kwargs):
        t = torch.randint(0, self.num_timesteps, (len(img),), device=img.device)
        return self.p_losses(img, t, *args, **kwargs)


class EMA:
    """Keeps a moving average of a model in a copy of it."""

    def __init__(self, model, decay=0.995):
        self.model, self.ema_model, self.decay = model, copy.deepcopy(model), decay

    @torch.no_grad()
    def update(self):
        for average, now in zip(self.ema_model.parameters(), self.model.parameters(), strict=True):
            average.lerp_(now, 1 - self.decay)

    def state_dict(self):
        return self.ema_model.state_dict()

    def load_state_dict(self, state):
        self.ema_model.load_state_dict(state)


def cycle(dl):
    while True:
        yield from dl


class Trainer:
    def __init__(self, diffusion_model, folder, *, image_size, train_batch_size, train_num_steps, train_lr=1e-4):
        self.model = diffusion_model
        self.train_num_steps = train_num_steps
        self.gradient_accumulate_every = 2
        self.ds = Images(folder, image_size)
        self.opt = torch.optim.Adam(diffusion_model.parameters(), lr=train_lr)
        self.ema = EMA(diffusion_model.model)
        dl = DataLoader(self.ds, batch_size=train_batch_size, shuffle=True)
        self.dl = cycle(dl)
        self.step = 0

    def train(self):
        while self.step < self.train_num_steps:
            for _ in range(self.gradient_accumulate_every):
                data = next(self.dl)
                loss = self.model(data)
                (loss / self.gradient_accumulate_every).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.opt.step()
            self.opt.zero_grad()
            self.ema.update()
            self.step += 1

    def save(self, path):
        torch.save({"step": self.step, "model": self.model.state_dict(), "ema": self.ema.state_dict()}, path)


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--train_num_steps", type=int, default=100_000)
    return parser.parse_args(argv)


def main(args):
    unet = UNet2DModel(
        sample_size=args.image_size, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    trainer = Trainer(
        GaussianDiffusion(unet, timesteps=args.timesteps), args.folder, image_size=args.image_size,
        train_batch_size=args.train_batch_size, train_num_steps=args.train_num_steps,
    )  # fmt: skip
    trainer.train()
    trainer.save(args.out)


if __name__ == "__main__":
    main(parse_args())
