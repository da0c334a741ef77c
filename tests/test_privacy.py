"""DP-SGD: per-sample gradients, clipping and noise against autograd, ε against the formula for whole orders."""

import json
import math

import numpy as np
import pytest
import torch

from toy import largest_difference, summary_of, toy_run, weights_of
from unrote.config import ModelConfig, TrainingConfig
from unrote.errors import InputError
from unrote.models.denoiser import build_unet

pytest.importorskip("opacus")

from unrote.training.privacy import PrivateGradients, privacy_spent

DP = {"training__dp_noise_multiplier": 0.5, "training__dp_max_grad_norm": 0.3}
ONE_FILTER = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@ONE_FILTER
@pytest.mark.parametrize("attention_levels", [(), (1,)])
def test_each_gradient_is_clipped_and_the_sum_is_noised(attention_levels):
    """Against one backward pass per sample. After attention, convolutions get inputs that Opacus alone misreads."""
    torch.manual_seed(0)
    config = ModelConfig(block_out_channels=(32, 32), attention_levels=attention_levels)
    unet = build_unet(config, resolution=8, channels=3, num_classes=3)
    # As built, the biases of the attention and of the last layer get gradients of very different sizes.
    images, t, classes = torch.randn(5, 3, 8, 8), torch.tensor([1, 5, 400, 700, 999]), torch.tensor([0, 1, 2, 0, 1])

    def losses(rows):
        return unet(images[rows], t[rows], class_labels=classes[rows]).sample.square().mean((1, 2, 3))

    expected = [torch.autograd.grad(losses([row])[0], list(unet.parameters())) for row in range(5)]
    norms = [math.sqrt(sum(float(g.square().sum()) for g in sample)) for sample in expected]
    limit, sigma = sorted(norms)[2], 1e-7
    clipped = [
        sum(min(1, limit / norm) * sample[k] for norm, sample in zip(norms, expected, strict=True)) / 5
        for k in range(len(expected[0]))
    ]
    private = PrivateGradients(unet, TrainingConfig(dp_noise_multiplier=sigma, dp_max_grad_norm=limit))
    for rows in ([0, 1, 2], [3, 4]):
        losses(rows).sum().backward()
        private.add()
    private.finish(5, 0, 1)
    for parameter, gradient in zip(unet.parameters(), clipped, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * limit)

    # The same with noise: what is added has the right size, and is a function of its seed.
    noised = []
    for seed in (1, 1, 2):
        loud = PrivateGradients.__new__(PrivateGradients)
        loud.__dict__ |= private.__dict__ | {"_sigma": 3.0, "_sums": [torch.zeros_like(p) for p in unet.parameters()]}
        loud.finish(5, seed)
        noised.append(torch.cat([parameter.grad.flatten() for parameter in unet.parameters()]))
    assert float(noised[0].std()) == pytest.approx(3 * limit / 5, rel=0.02)
    assert torch.equal(noised[0], noised[1]) and not torch.equal(noised[0], noised[2])


def epsilon_by_whole_orders(sigma, rate, steps, delta):
    """Mironov et al. 2019, Eq. for whole α, and the conversion of Balle et al. 2020."""
    found = []
    for alpha in range(2, 64):
        terms = [
            math.log(math.comb(alpha, k) * (1 - rate) ** (alpha - k) * rate**k) + k * (k - 1) / (2 * sigma**2)
            for k in range(alpha + 1)
        ]
        renyi = steps * float(np.logaddexp.reduce(terms)) / (alpha - 1)
        found.append(renyi + math.log((alpha - 1) / alpha) - (math.log(delta) + math.log(alpha)) / (alpha - 1))
    return min(found)


@pytest.mark.parametrize(("sigma", "batch", "steps"), [(1.0, 10, 500), (2.0, 100, 200), (0.8, 1, 1000)])
def test_epsilon_by_an_independent_formula(sigma, batch, steps):
    training = TrainingConfig(dp_noise_multiplier=sigma, batch_size=batch, dp_delta=1e-5)
    spent = privacy_spent(training, 1000, steps)
    upper = epsilon_by_whole_orders(sigma, batch / 1000, steps, 1e-5)
    assert spent["delta"] == 1e-5
    assert 0.9 * upper < spent["epsilon"] <= upper * (1 + 1e-9), "Opacus has orders in between as well"
    assert privacy_spent(TrainingConfig(), 1000, steps) == {}


@ONE_FILTER
def test_a_private_run_trains_says_its_epsilon_and_is_the_same_again(tmp_path):
    run = toy_run(tmp_path / "run", training__epochs=2, **DP)
    again = toy_run(tmp_path / "again", training__epochs=2, training__checkpointing_steps=2, **DP)
    parts = toy_run(tmp_path / "parts", training__epochs=2, training__gradient_accumulation_steps=3, **DP)
    assert largest_difference(weights_of(again, "raw"), weights_of(run, "raw")) == 0
    assert largest_difference(weights_of(parts, "raw"), weights_of(run, "raw")) < 2e-3
    summary = summary_of(run)
    expected = epsilon_by_whole_orders(0.5, 8 / 26, summary["steps"], 1e-5)
    assert summary["epsilon"] == pytest.approx(expected, rel=0.1)
    assert json.loads((run.model_folder / "unet" / "config.json").read_text())["_class_name"] == "UNet2DModel"
    assert "epsilon" not in summary_of(toy_run(tmp_path / "plain", training__epochs=0.5))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("iet-agc", {}, "does not go with ensemble, gate"),
        ("standard", {"augmentation__enabled": True}, "does not go with augmentation"),
        ("standard", {"training__mixed_precision": "fp16"}, "mixed_precision=fp16"),
    ],
)
def test_what_would_leak_or_break_is_refused(tmp_path, method, settings, message):
    with pytest.raises(InputError, match=message):
        toy_run(tmp_path / "run", method, **DP, **settings)
