"""Any vision model of the ``transformers`` library as an encoder: DINOv2, CLIP, ViT, SigLIP …

From a folder or from the Hub. Images are prepared by the model's own image processor in its Pillow version, so that the
features do not depend on whether torchvision is installed.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from unrote.encoders.resize import rgb
from unrote.errors import InputError, first_line
from unrote.files import sha256_file

BATCH = 16
DEFAULTS = {"dinov2": "facebook/dinov2-base", "clip": "openai/clip-vit-base-patch32"}
_SMALL_FILES = ["*.json", "*.txt", "*.model"]


class VisionModel:
    """Features of a model: the projected image embedding if it has one (CLIP), else the pooled output.

    A checkpoint without weights for a pooling layer (many ViTs) gives the first token of the last layer instead.
    """

    copy_detection = True
    is_fid_inception = False

    def __init__(self, key: str, where: str = "", device: str = "cpu") -> None:
        where = where or DEFAULTS[key]
        folder = model_folder(key, where)
        self.key = key
        self.name = where if not Path(where).is_dir() else folder.resolve().name
        self.weights_sha256 = weights_hash(folder)
        self.device = device
        self.model, self.pooled = _load_model(folder, device)
        self.processor = image_processor(folder)
        self.preprocessing = describe(self.processor)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n, D] of uint8 images [n, H, W, C], C = 1 or 3."""
        return np.concatenate([self._forward(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])

    def _forward(self, images: np.ndarray) -> np.ndarray:
        pixels = prepared(self.processor, images).to(self.device)
        if hasattr(self.model, "get_image_features"):
            output = self.model.get_image_features(pixel_values=pixels)
            features = getattr(output, "pooler_output", output)  # a tensor before transformers 5
        else:
            output = self.model(pixel_values=pixels)
            features = output.pooler_output if self.pooled else output.last_hidden_state[:, 0]
        result: np.ndarray = features.flatten(1).float().cpu().numpy()
        return result


def model_folder(key: str, where: str) -> Path:
    """``where`` if it is a folder, else the Hub's copy of that model: downloaded, or from its cache when offline.

    Raises:
        InputError: neither.
    """
    if Path(where).expanduser().is_dir():
        return Path(where).expanduser()
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(where, allow_patterns=[*_SMALL_FILES, "model*.safetensors"]))
        if not _weight_files(folder):  # models from before safetensors; transformers loads them with weights_only
            huggingface_hub.snapshot_download(where, allow_patterns=["pytorch_model*.bin"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{key}={where}: no such folder, and not to be had from the Hub ({type(error).__name__}). Fetch the "
            "model's config.json, preprocessor_config.json and model.safetensors (for a CLIP score also its tokenizer "
            f"files) on another machine into a folder and give {key}=FOLDER"
        ) from error
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """Those that transformers loads: safetensors first."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def weights_hash(folder: Path) -> str:
    """Hex SHA-256 of the only weight file, or over those of all parts in order of their names.

    Raises:
        InputError: there is none.
    """
    hashes = [sha256_file(path) for path in _weight_files(folder)]
    if not hashes:
        raise InputError(f"{folder} holds no weights (model.safetensors)")
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _load_model(folder: Path, device: str) -> tuple[Any, bool]:
    """The model, and whether its pooling layer is trained."""
    from transformers import AutoModel

    with readable(folder):
        model, loading = AutoModel.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            weights_only=True,
            trust_remote_code=False,  # unless told so, it asks at the terminal
        )
    if model.main_input_name != "pixel_values" and not hasattr(model, "get_image_features"):
        raise InputError(f"{folder} holds a {type(model).__name__}, which takes no images")
    missing = [name for name in loading["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise InputError(
            f"{folder}: the weights lack {len(missing)} tensors of {type(model).__name__}, such as {missing[0]}"
        )
    return model.to(device).eval(), not loading["missing_keys"]


def image_processor(folder: Path) -> Any:
    """The model's own, in its Pillow version."""
    from transformers import AutoImageProcessor

    with readable(folder):
        processor: Any = AutoImageProcessor
        return processor.from_pretrained(folder, backend="pil", local_files_only=True, trust_remote_code=False)


def prepared(processor: Any, images: np.ndarray) -> torch.Tensor:
    """float32 [n, 3, h, w] of uint8 images [n, H, W, C]."""
    # Pillow images, because given arrays the processor guesses which axis holds the channels.
    pictures = [Image.fromarray(image) for image in rgb(images)]
    pixels: torch.Tensor = processor(images=pictures, return_tensors="pt")["pixel_values"]
    return pixels


def describe(processor: Any) -> str:
    """What the processor does, in words."""
    settings = processor.to_dict()
    words = [type(processor).__name__]
    if settings.get("do_resize"):
        resample = Image.Resampling(int(settings["resample"])).name.lower()
        words.append(f"resize to {_size(settings['size'])} ({resample}, Pillow)")
    if settings.get("do_center_crop"):
        words.append(f"centre crop to {_size(settings['crop_size'])}")
    if settings.get("do_normalize"):
        words.append(f"minus mean {list(settings['image_mean'])}, divided by {list(settings['image_std'])}")
    return ", ".join(words) + "; grey as three equal channels"


def _size(size: Any) -> str:
    return ", ".join(f"{key} {value}" for key, value in size.items() if value) if isinstance(size, dict) else str(size)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What transformers raises about the files in a folder, as InputError."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder} cannot be read as a transformers model: {first_line(error)}") from error
