"""A subclass of transformers' Trainer whose ``compute_loss`` is the denoising loss."""

import argparse

import torch
import torch.nn.functional as F
from datasets import load_dataset
from diffusers import DDPMScheduler, UNet2DModel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from shared import to_pixels


class DiffusionTrainer(Trainer):
    def __init__(self, *args, noise_scheduler, **kwargs):
        super().__init__(*args, **kwargs)
        self.noise_scheduler = noise_scheduler

    def get_train_dataloader(self):
        dataloader = DataLoader(
            self.train_dataset, self.args.per_device_train_batch_size, shuffle=True, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(dataloader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        images = inputs["pixel_values"]
        noise = torch.randn_like(images)
        timesteps = torch.randint(
            0, self.noise_scheduler.config.num_train_timesteps, (len(images),), device=images.device
        )
        prediction = model(self.noise_scheduler.add_noise(images, noise, timesteps), timesteps).sample
        return F.mse_loss(prediction, noise)


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_data_dir", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--num_train_epochs", type=int, default=100)
    return parser.parse_args(argv)


def main(args):
    dataset = load_dataset("imagefolder", data_dir=args.train_data_dir, split="train")
    dataset.set_transform(
        lambda examples: {"pixel_values": [to_pixels(image, args.resolution) for image in examples["image"]]}
    )
    model = UNet2DModel(
        sample_size=args.resolution, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    training_args = TrainingArguments(
        output_dir=args.output_dir, per_device_train_batch_size=args.train_batch_size, learning_rate=1e-4,
        num_train_epochs=args.num_train_epochs, remove_unused_columns=False, save_strategy="no", report_to="none",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = DiffusionTrainer(
        model=model, args=training_args, train_dataset=dataset, noise_scheduler=DDPMScheduler(args.timesteps)
    )
    trainer.train()
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main(parse_args())
