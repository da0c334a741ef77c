"""Low-rank adapters by peft: adding, averaging over proxies, saving."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unrote.config import LoraConfig
from unrote.errors import InputError, first_line
from unrote.tensorfiles import weighted_average


class Adapters(nn.Module):
    """The low-rank adapters of a denoiser and nothing else of it: the parameters are the denoiser's own.

    Args:
        denoiser: a model with peft adapters, whose other weights need no gradient.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)


def add_adapters(denoiser: Any, config: LoraConfig) -> Adapters:
    """Freeze ``denoiser`` and put float32 adapters beside its weights, which leave its output as it is.

    Raises:
        InputError: peft is not installed, or no module has such a name.
    """
    try:
        import peft
    except ImportError:
        raise InputError("model.train: lora needs peft; run: pip install 'unrote[text]'") from None
    denoiser.requires_grad_(False)
    alpha: Any = config.rank if config.alpha is None else config.alpha
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        init_lora_weights="gaussian",
    )
    try:
        denoiser.add_adapter(settings)
    except ValueError as error:
        raise InputError(f"model.lora.target_modules: {first_line(error)}") from None
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Adapters(denoiser)


def average_products(states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """The mean ``Σ_k w_k B_k A_k`` of the weight changes, cut back to the rank; what is no adapter is averaged plainly.

    The mean of K products of rank r has rank up to K·r; its r largest singular values are kept, which is the nearest
    such product (Eckart and Young 1936). B gets the singular values, and A's rows the length that they have on average:
    where B is 0, as at the start, a product tells nothing of A, and with both 0 nothing would ever be learned.

    Args:
        states: of K proxies: tensors by name, adapters named as :class:`Adapters` does, both factors of each.
        weights: K weights that sum to 1.
    """
    proxies = list(states)
    average = weighted_average(proxies, weights)
    for down in (name for name in list(average) if "/lora_A/" in name):
        up = down.replace("/lora_A/", "/lora_B/")
        pairs = [(proxy[up], proxy[down]) for proxy in proxies]
        average[up], average[down] = _nearest_product(pairs, weights)
    return average


def _nearest_product(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Factors [out, r, …] and [r, in, …] of the mean of products, computed in float64 by QR, as it has low rank."""
    up, down = pairs[0]
    left = torch.cat([w * b.double().flatten(1) for w, (b, _) in zip(weights, pairs, strict=True)], 1)
    right = torch.cat([a.double().flatten(1) for _, a in pairs], 0)
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    rank = len(down)
    # A small layer may have fewer singular values than the rank: the rest are 0.
    u, s, v = (F.pad(u, (0, rank))[:, :rank], F.pad(s, (0, rank))[:rank], F.pad(v, (0, 0, 0, rank))[:rank])
    length = right.norm(dim=1).mean().clamp(min=1e-12)
    new_up, new_down = left_basis @ u * (s / length), length * v @ right_basis.T
    return new_up.reshape(up.shape).to(up.dtype), new_down.reshape(down.shape).to(down.dtype)


def adapter_layers(denoiser: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """The adapters under peft's names, which diffusers reads for all of its models.

    Its older names are for some modules only, and of a file that mixes both it leaves out one half.

    alpha / rank is multiplied into one factor, so that no reader need know alpha: they take it to be the rank.
    """
    from peft.utils import get_peft_model_state_dict

    layers: dict[str, Tensor] = get_peft_model_state_dict(denoiser, save_embedding_layers=False)
    scale = 1.0 if config.alpha is None else config.alpha / config.rank
    return {name: value * scale if ".lora_B." in name else value for name, value in layers.items()}
