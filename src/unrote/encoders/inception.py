"""The Inception network that the Fréchet Inception Distance is defined with (Heusel et al. 2017).

Two published translations of Google's ``inception-2015-12-05`` are read. Both take 8-bit images of any size and resize
inside, as the original did, so no resizing of ours comes before them.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unrote.encoders.resize import rgb
from unrote.encoders.weights import existing_file, load_torchscript, weights_folder
from unrote.errors import InputError
from unrote.files import sha256_file

BATCH = 32
TORCHSCRIPT = "inception-2015-12-05.pt"
STATE_DICT = "pt_inception-2015-12-05-6726825d.pth"
# Of the files that NVIDIA's StyleGAN metrics and pytorch-fid (and torch-fidelity) download, as many projects pin them.
FID_SHA256 = {
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4": TORCHSCRIPT,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": STATE_DICT,
}
URLS = {
    TORCHSCRIPT: f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{TORCHSCRIPT}",
    STATE_DICT: f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{STATE_DICT}",
}


class InceptionEncoder:
    """2,048 features before the classifier. A distance is an FID only if the file is one of those known by SHA-256."""

    key = "inception"
    preprocessing = (
        "none before the network, which resizes to 299×299 and normalises itself; grey as three equal channels"
    )
    copy_detection = False

    def __init__(self, where: str = "", device: str = "cpu") -> None:
        path = existing_file(Path(where), self.key) if where else _cached()
        self.weights_sha256 = sha256_file(path)
        self.is_fid_inception = self.weights_sha256 in FID_SHA256
        self.name = f"Inception {FID_SHA256.get(self.weights_sha256, path.name)}"
        self.device = device
        self.scripted = _is_torchscript(path)
        if not self.scripted and not self.is_fid_inception:
            # torch-fidelity unpickles the file, which can run anything: it gets only the one that is known.
            raise InputError(f"{path} is neither a TorchScript file nor {STATE_DICT} (SHA-256 {self.weights_sha256})")
        self.model: Any = load_torchscript(path, device) if self.scripted else _torch_fidelity(path, device)

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features float32 [n, 2048] of uint8 images [n, H, W, C], C = 1 or 3."""
        features = [self._forward(rgb(images[start : start + BATCH])) for start in range(0, len(images), BATCH)]
        return np.concatenate(features)

    def _forward(self, images: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device)
        features = self.model(pixels, return_features=True) if self.scripted else self.model(pixels)[0]
        result: np.ndarray = features.flatten(1).float().cpu().numpy()
        return result


def _cached() -> Path:
    """The first known file in the weights folder.

    Raises:
        InputError: there is none.
    """
    folder = weights_folder()
    for name in URLS:
        if (folder / name).exists():
            return folder / name
    ways = "; or ".join(f"{url} at {folder / name}" for name, url in URLS.items())
    raise InputError(
        f"inception needs the weights of the FID: give inception=FILE, or place {ways} (needs torch-fidelity)"
    )


def _is_torchscript(path: Path) -> bool:
    """TorchScript is a zip archive with code in it; a state dict is not."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _torch_fidelity(path: Path, device: str) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises RuntimeError
        raise InputError(
            f"{path} holds weights only, and their network is in torch-fidelity, which cannot be imported ({error}): "
            f"pip install torch-fidelity (and your torch's torchvision), or give {TORCHSCRIPT}, which needs neither"
        ) from error
    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    return model.to(device).eval()
