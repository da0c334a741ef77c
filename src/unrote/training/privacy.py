"""DP-SGD (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1) with per-sample gradients and accounting by Opacus."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unrote.config import TrainingConfig
from unrote.errors import InputError
from unrote.seeding import generator


def _opacus() -> Any:
    try:
        import opacus
    except ImportError:
        raise InputError("training.dp_noise_multiplier needs Opacus; run: pip install 'unrote[dp]'") from None
    return opacus


class PrivateGradients:
    """Gradients whose dependence on any one sample is bounded and hidden in noise: ``(Σ_i clip(g_i, C) + σ C z) / B``.

    Call :meth:`add` after ``backward`` of the *sum* of the losses, once or for each part of a batch, then
    :meth:`finish`.

    Args:
        model: gets Opacus' hooks; every parameter that trains must be in a layer that Opacus knows.
        training: σ (``dp_noise_multiplier``) and C (``dp_max_grad_norm``).

    Raises:
        InputError: if Opacus is not installed.
    """

    def __init__(self, model: nn.Module, training: TrainingConfig) -> None:
        assert training.dp_noise_multiplier is not None
        self._sigma, self._limit = training.dp_noise_multiplier, training.dp_max_grad_norm
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._sums: list[Tensor] = []
        # Opacus 1.6 reads convolutions' inputs as if they were contiguous, and those after attention are not: the
        # gradients would be wrong and the bound on them void.
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(lambda _, inputs: tuple(value.contiguous() for value in inputs))
        # The images need no gradient, which torch finds worth a warning.
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        self._hooked = _opacus().GradSampleModule(model, loss_reduction="sum")

    def add(self) -> None:
        """Clip the gradient of each sample of the last ``backward`` to norm C, and add them up."""
        gradients: list[Tensor] = [parameter.grad_sample for parameter in self._parameters]  # type: ignore[attr-defined]
        norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (self._limit / norms.clamp(min=1e-12)).clamp(max=1)
        sums = [torch.einsum("n,n...->...", factors, gradient) for gradient in gradients]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        for parameter in self._parameters:
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def finish(
        self, count: int, *seed: int | str, add_up: Callable[[Sequence[nn.Parameter]], None] = lambda _: None
    ) -> None:
        """Make the parameters' gradients of what was added, for a batch of ``count``; ``seed`` is the noise's.

        ``add_up`` adds gradients up over those who share the batch; all then have the same, with noise once.
        """
        draw = generator(*seed, "privacy", device=self._parameters[0].device)
        for index, parameter in enumerate(self._parameters):
            parameter.grad = self._sums[index] if self._sums else None  # there is no sum without a sample
        add_up(self._parameters)
        for parameter in self._parameters:
            assert parameter.grad is not None
            noise = torch.randn(parameter.shape, generator=draw, device=parameter.device)
            parameter.grad = (parameter.grad + self._sigma * self._limit * noise) / count
        self._sums = []


def privacy_spent(training: TrainingConfig, num_samples: int, steps: int) -> dict[str, float]:
    """What ``run.json`` says of privacy after ``steps``: ε at δ by the Rényi accountant; nothing without DP-SGD.

    It is the ε of batches that take each sample independently with chance B/N. Batches here are shuffled, which is
    common practice and not covered by that proof.
    """
    if training.dp_noise_multiplier is None:
        return {}
    accountant = _opacus().accountants.RDPAccountant()
    rate = min(1.0, training.batch_size / num_samples)
    accountant.history = [(training.dp_noise_multiplier, rate, steps)]
    return {"epsilon": float(accountant.get_epsilon(delta=training.dp_delta)), "delta": training.dp_delta}
