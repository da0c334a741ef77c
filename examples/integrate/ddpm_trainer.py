"""The model and trainer of the ``denoising-diffusion-pytorch`` package, used as its own documentation says."""

import argparse

from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--timesteps", type=int, default=1000)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--train_num_steps", type=int, default=100_000)
    return parser.parse_args(argv)


def main(args):
    unet = Unet(dim=args.dim, dim_mults=(1, 2))
    diffusion = GaussianDiffusion(unet, image_size=args.image_size, timesteps=args.timesteps)
    trainer = Trainer(
        diffusion,
        args.folder,
        train_batch_size=args.train_batch_size,
        gradient_accumulate_every=2,
        train_num_steps=args.train_num_steps,
        calculate_fid=False,
        results_folder=args.out,
    )
    trainer.train()
    trainer.save("last")


if __name__ == "__main__":
    main(parse_args())
