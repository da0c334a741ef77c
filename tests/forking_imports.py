"""What the server of :mod:`forking` imports once, for all processes."""

import gc

import torch

import toy  # noqa: F401
import unrote.cli
import unrote.models.pixels
import unrote.sampling
import unrote.training.loop  # noqa: F401

torch.set_num_threads(1)
gc.freeze()
