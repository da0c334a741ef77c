"""Baselines that change noise, timesteps or targets, against formulas and a Gaussian whose denoiser is known."""

import math

import numpy as np
import pytest
import torch

from toy import SETTINGS, toy_images
from unrote.config import ModelConfig, TrainingConfig, load_config
from unrote.models.ambient import Ambient
from unrote.models.denoiser import DenoisingLoss, build_schedule
from unrote.models.making import make_task
from unrote.training.step import TrainingStep
from unrote.training.timesteps import timestep_weights

CPU = torch.device("cpu")
TYPES = ["epsilon", "v_prediction", "sample"]


def ambient_of(prediction_type, timestep=300, seed=0):
    loss = DenoisingLoss(build_schedule(ModelConfig(prediction_type=prediction_type)), CPU)
    return Ambient(loss, timestep, seed)


def level(t):
    """Signal and noise level of the linear schedule, in float64."""
    power = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t]
    return math.sqrt(power), math.sqrt(1 - power)


def numbers(count, seed):
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", [301, 400, 700, 999])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_ambient_loss_is_least_for_the_ordinary_denoiser(prediction_type, t):
    """x_0 ~ N(μ, τ²): what the loss is least for, found by regression, is what is expected given x_t in closed form."""
    count, mu, tau, (a, s) = 200_000, 0.4, 0.6, level(t)
    clean, fixed, fresh = mu + tau * numbers(count, 0), numbers(count, 1), numbers(count, 2)
    timesteps = torch.full((count,), t)
    ambient = ambient_of(prediction_type)
    seen = (a * clean + s * ambient.noise(fresh, fixed, timesteps)).flatten().double()
    # The loss of a constant prediction p is (c p − target)²: target and c follow from its values at p = 0 and ±1.
    at = {
        p: ambient.errors(torch.full_like(clean, p), clean, fresh, fixed, timesteps).double() for p in (-1.0, 0.0, 1.0)
    }
    c = ((at[1.0] + at[-1.0] - 2 * at[0.0]) / 2).clamp(min=0).sqrt()
    target = (at[-1.0] - at[1.0]) / (4 * c)
    assert c.std() < 1e-3 * c.mean()
    slope = torch.cov(torch.stack([seen, target / c]))[0, 1] / seen.var()
    intercept = (target / c).mean() - slope * seen.mean()

    gain = 1 / (a**2 * tau**2 + s**2)
    noise_slope, image_slope = s * gain, a * tau**2 * gain
    noise = (noise_slope, -noise_slope * a * mu)
    image = (image_slope, mu - image_slope * a * mu)
    velocity = tuple(a * n - s * i for n, i in zip(noise, image, strict=True))
    expected = {"epsilon": noise, "v_prediction": velocity, "sample": image}[prediction_type]
    error = 6 * float((target / c - slope * seen - intercept).std()) / math.sqrt(count)
    assert float(slope) == pytest.approx(expected[0], abs=error / float(seen.std()))
    assert float(intercept) == pytest.approx(expected[1], abs=error * (1 + abs(float(seen.mean())) / float(seen.std())))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_what_is_seen_at_high_noise_comes_from_one_noisy_version_and_so_does_the_loss(prediction_type):
    """Two images with the same noisy version at n are the same to the model and to the loss from there on."""
    ambient, n, t = ambient_of(prediction_type), 300, torch.tensor([300, 301, 650, 999])
    clean, fixed, fresh, prediction = (torch.randn(4, 3, 8, 8) for _ in range(4))
    other = torch.randn(4, 3, 8, 8)
    a_n, s_n = level(n)
    other_fixed = (a_n * clean + s_n * fixed - a_n * other) / s_n
    signal, sigma = ambient._loss.levels(t)
    seen, seen_of_other = (
        signal * images + sigma * ambient.noise(fresh, own, t) for images, own in [(clean, fixed), (other, other_fixed)]
    )
    torch.testing.assert_close(seen, seen_of_other, rtol=0, atol=1e-4)
    r = torch.tensor([level(int(step))[0] / a_n for step in t]).view(-1, 1, 1, 1)
    expected = r * (a_n * clean + s_n * fixed) + (1 - r**2).clamp(min=0).sqrt() * fresh
    torch.testing.assert_close(seen.double(), expected.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        ambient.errors(prediction, clean, fresh, fixed, t),
        ambient.errors(prediction, other, fresh, other_fixed, t),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("prediction_type", TYPES)
def test_the_ambient_loss_is_ordinary_below_its_timestep_and_asks_nothing_at_it(prediction_type):
    ambient, t = ambient_of(prediction_type), torch.tensor([0, 299, 300])
    clean, fixed, fresh = (torch.randn(3, 3, 8, 8) for _ in range(3))
    prediction = torch.randn(3, 3, 8, 8, requires_grad=True)
    losses = ambient.errors(prediction, clean, fresh, fixed, t)
    assert torch.equal(losses[:2], ambient._loss.errors(prediction, clean, fresh, t)[:2])
    assert torch.equal(ambient.noise(fresh, fixed, t)[:2], fresh[:2])
    losses.sum().backward()
    assert prediction.grad[:2].abs().amin() > 0
    assert prediction.grad[2].abs().amax() < 1e-3 * prediction.grad[1].abs().amax()


@pytest.mark.parametrize("prediction_type", TYPES)
def test_without_noise_at_its_timestep_the_ambient_loss_is_the_ordinary_one(prediction_type):
    """n = 0 is nearly clean: r → a, q → s."""
    ambient, t = ambient_of(prediction_type, timestep=0), torch.tensor([300, 700, 999])
    clean, fixed, fresh, prediction = (torch.randn(3, 3, 8, 8) for _ in range(4))
    ordinary = ambient._loss.errors(prediction, clean, fresh, t)
    torch.testing.assert_close(ambient.errors(prediction, clean, fresh, fixed, t), ordinary, rtol=0.05, atol=0)


def test_fixed_noise_is_a_function_of_seed_and_image():
    ambient, shape = ambient_of("epsilon"), torch.Size((2, 3, 8, 8))
    first = ambient.fixed_noise(torch.tensor([7, 9]), shape, CPU)
    assert torch.equal(ambient.fixed_noise(torch.tensor([9, 7]), shape, CPU), first.flip(0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(ambient_of("epsilon", seed=1).fixed_noise(torch.tensor([7, 9]), shape, CPU), first)
    many = ambient.fixed_noise(torch.arange(200), torch.Size((200, 3, 8, 8)), CPU)
    assert float(many.mean()) == pytest.approx(0, abs=0.02)
    assert float(many.std()) == pytest.approx(1, abs=0.02)


def step_of(**training):
    """A training step of a tiny model, and its task."""
    settings = SETTINGS | {f"training.{name}": value for name, value in training.items()}
    settings |= {"data.random_flip": True, "model.prediction_type": "epsilon", "model.beta_schedule": "linear"}
    config = load_config(method="standard", overrides=settings)
    torch.manual_seed(0)
    task = make_task(config, toy_images(), CPU)
    return TrainingStep(config, task, 26, CPU, 10), task


@pytest.mark.parametrize("training", [{"input_perturbation": 0.3}, {"ambient_timestep": 200}, {}])
def test_what_the_network_gets_and_what_it_is_asked_for(training):
    """By a hook on the network: its input and output, and the loss that the step makes of them."""
    step, task = step_of(**training)
    calls = []
    task.denoiser.register_forward_hook(lambda _, given, output: calls.append((given, output.sample)))
    drawn, draw_noise = [], step._noise_for

    def noting(clean, *arguments):
        drawn.append((clean, *draw_noise(clean, *arguments)))
        return drawn[-1][1:]

    step._noise_for = noting
    losses, _ = step(torch.arange(26), proxy=0, step=1)
    clean, noise, timesteps, _, fixed = drawn[0]
    (given, at), prediction = calls[0]
    assert torch.equal(at, timesteps)
    for row, t in enumerate(timesteps.tolist()):
        a, s = level(t)
        found = (given[row] - a * clean[row]) / s
        if "ambient_timestep" in training and t >= 200:
            a_n, s_n = level(200)
            r = a / a_n
            kept, q = a_n * clean[row] + s_n * fixed[row], math.sqrt(max(1 - r**2, 0))
            torch.testing.assert_close(given[row], r * kept + q * noise[row], rtol=0, atol=1e-4)
            expected = (q / s * prediction[row] - noise[row]).square().mean()
        else:
            expected = (prediction[row] - noise[row]).square().mean()
            assert float((found - noise[row]).std()) == pytest.approx(training.get("input_perturbation", 0), abs=0.07)
        assert float(losses[row].detach()) == pytest.approx(float(expected.detach()), rel=1e-3)


def test_a_mirrored_image_has_its_noise_mirrored():
    step, _ = step_of(ambient_timestep=200)
    clean, draw = torch.zeros(2, 3, 8, 8), torch.Generator().manual_seed(0)
    fixed = step._noise_for(clean, torch.tensor([5, 5]), torch.tensor([False, True]), draw)[3]
    assert torch.equal(fixed[1], fixed[0].flip(-1))


@pytest.mark.parametrize(
    ("settings", "biased"),
    [
        ({"strategy": "later", "portion": 0.2}, range(80, 100)),
        ({"strategy": "earlier", "portion": 0.25}, range(25)),
        ({"strategy": "range", "begin": 10, "end": 30}, range(10, 30)),
        ({"strategy": "range", "begin": 90}, range(90, 100)),
        ({"strategy": "later", "portion": 0.0}, range(0)),
    ],
)
def test_biased_timesteps_are_so_many_times_as_frequent(settings, biased):
    training = TrainingConfig(timestep_bias_multiplier=3, **{f"timestep_bias_{k}": v for k, v in settings.items()})
    weights = timestep_weights(training, 100)
    relative = np.array([3.0 if t in biased else 1.0 for t in range(100)])
    np.testing.assert_allclose(weights, relative / relative.sum(), rtol=1e-5)
    assert timestep_weights(TrainingConfig(), 100) is None


def test_timesteps_are_drawn_as_often_as_their_weights_say():
    step, _ = step_of(timestep_bias_strategy="later", timestep_bias_portion=0.25, timestep_bias_multiplier=3)
    drawn = step._timesteps(40_000, torch.Generator().manual_seed(0))
    assert float((drawn >= 750).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert int(drawn.min()) >= 0 and int(drawn.max()) <= 999


def test_the_noise_offset_is_one_number_per_image_and_channel_and_is_asked_for():
    def drawn(offset):
        config = load_config(method="standard", overrides=SETTINGS | {"training.noise_offset": offset})
        images = toy_images(64)
        step = TrainingStep(config, make_task(config, images, CPU), len(images), CPU, 10)
        clean = torch.zeros(64, 3, 8, 8)
        noise, _, shown, _ = step._noise_for(clean, torch.arange(64), None, torch.Generator().manual_seed(0))
        assert shown is noise, "what the denoiser is to find has it too"
        return noise

    added = drawn(0.1) - drawn(0.0)
    assert float((added - added.mean((2, 3), keepdim=True)).abs().max()) < 1e-6
    assert 0.08 < float(added[..., 0, 0].std()) < 0.12
