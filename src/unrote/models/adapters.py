"""Low-rank adapters by peft: adding, averaging over proxies, saving."""

from typing import Any

from torch import Tensor, nn

from unrote.config import LoraConfig
from unrote.errors import InputError


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
        raise InputError(f"model.lora.target_modules: {str(error).splitlines()[0]}") from None
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Adapters(denoiser)


def adapter_layers(denoiser: nn.Module, config: LoraConfig) -> dict[str, Tensor]:
    """The adapters as diffusers names them in a file.

    alpha / rank is multiplied into one factor, so that no reader need know alpha: they take it to be the rank.
    """
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers: dict[str, Tensor] = convert_state_dict_to_diffusers(get_peft_model_state_dict(denoiser))
    scale = 1.0 if config.alpha is None else config.alpha / config.rank
    return {
        name: value * scale if ".lora_B." in name or ".lora.up." in name else value for name, value in layers.items()
    }
