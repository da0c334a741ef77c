"""diffusers' own three training examples, changed as docs/integrate.md says, at toy size: what the parts saw in them.

No package contains the scripts, so this takes a checkout of diffusers; CI runs scripts of the same structure. Where
torchvision is not installed, Pillow stands in for its transforms. It fails where a part did nothing or did it wrongly.

    python benchmarks/diffusers_scripts.py DIFFUSERS
"""

import argparse
import enum
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from difflib import unified_diff
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (before torchvision is stood in for)
import datasets  # noqa: F401
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
from diffusers import UNet2DModel
from PIL import ImageOps

import unrote
from unrote.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import torchvision_standin
from test_integrate import EPOCHS, IMAGES, folder_of
from tiny_pipelines import tiny_stable_diffusion

RESULTS = Path(__file__).parent / "results"
SCRIPTS = {
    "train_unconditional": "unconditional_image_generation/train_unconditional.py",
    "train_text_to_image": "text_to_image/train_text_to_image.py",
    "train_text_to_image_lora": "text_to_image/train_text_to_image_lora.py",
}
TIMESTEPS = 10
ADAPTERS = 'torch.nn.ParameterList(optimizer.param_groups[0]["params"])'


def edits(name: str) -> dict[str, str]:
    """What each line of the script that a pattern finds becomes; ``\\g<0>`` is what was found."""
    plain = name == "train_unconditional"
    loss = r"(?m)^( +loss = )F\.mse_loss\((model_\w+\.float\(\), \w+\.float\(\))(?:, reduction=.mean.)?\)(?=$|  #)"
    per_sample = r'F.mse_loss(\2, reduction="none").mean((1, 2, 3))'
    trained = {"train_unconditional": "model", "train_text_to_image": "unet"}.get(name, ADAPTERS)
    data = "dataset" if plain else "train_dataset"
    kept = ', ema=ema_model, kept={"lr": lr_scheduler}' if plain else ""
    collate = "" if plain else ", collate_fn=collate_fn"
    # What counts steps must have the new loader.
    before = r"(?m)^    global_step = 0$" if plain else r"(?m)^    # We need to recalculate our total training steps"
    images = r'batch\["input"\]\.to\([\w=]+\)' if plain else r'batch\["pixel_values"\]\.to\([\w=]+\)'
    # What is below the average is skipped, so that a run as short as this skips.
    parts = f"""    gate = unrote.LossGate({TIMESTEPS}, 1.0, bank=unrote.LossBank({TIMESTEPS}, bins=1, warm_start=True))
    ensemble = unrote.ShardEnsemble({trained}, optimizer, {data}, 4, gate=gate{kept})
    ensemble.redistribution = unrote.Redistribution()
    train_dataloader = ensemble.loader(lambda part: accelerator.prepare(
        torch.utils.data.DataLoader(part, args.train_batch_size, shuffle=True{collate})))
"""
    return {
        r"(?m)^import diffusers$": r"\g<0>\nimport unrote",
        loss: rf"\1gate({per_sample}, timesteps, train_dataloader.index)",
        before: parts + r"\g<0>",
        r"(?<=clean_images = )" + images if plain else r"(?<=vae\.encode\()" + images: (
            r"unrote.augment_near_threshold(gate, \g<0>, train_dataloader.index)"
        ),
    }


def changed(name: str, text: str) -> str:
    """The script with every edit, each of which finds one place."""
    for pattern, replacement in edits(name).items():
        text, count = re.subn(pattern, replacement, text)
        if count != 1:
            raise SystemExit(f"{name}: {pattern!r} is found {count} times, not once: this version is another")
    return text


class InterpolationMode(enum.Enum):
    """By the names that the scripts offer."""

    BILINEAR, LANCZOS = "bilinear", "lanczos"


@contextmanager
def stand_in() -> Iterator[None]:
    """Inside the block, what the scripts ask of torchvision."""
    with torchvision_standin.standing_in():
        add_transforms(sys.modules["torchvision"])
        yield


def add_transforms(module: Any) -> None:
    """What the stand-in of the tests does not have."""
    module.__spec__ = ModuleSpec("torchvision", None)
    transforms: Any = module.transforms
    transforms.InterpolationMode = InterpolationMode
    transforms.Resize = lambda size, interpolation: lambda image: ImageOps.fit(image, (size, size))
    transforms.CenterCrop = transforms.RandomCrop = lambda size: lambda image: ImageOps.fit(image, (size, size))
    transforms.PILToTensor, transforms.ConvertImageDtype = (
        torchvision_standin.to_tensor,
        lambda _: lambda tensor: tensor,
    )
    transforms.Normalize = lambda mean, std: lambda tensor: (tensor - mean[0]) / std[0]


def given(name: str, work: Path) -> list[str]:
    """Arguments of the script."""
    common = ["--train_data_dir", f"{work}/photos", "--output_dir", f"{work}/out", "--resolution", "16"]
    common += ["--train_batch_size", "2", "--cache_dir", f"{work}/cache"]
    if name != "train_unconditional":
        return [*common, "--pretrained_model_name_or_path", f"{work}/base", "--num_train_epochs", str(EPOCHS)]
    steps = [f"--ddpm_num_steps={TIMESTEPS}", f"--ddpm_num_inference_steps={TIMESTEPS}", "--use_ema"]
    return [*common, *steps, f"--num_epochs={EPOCHS}", f"--model_config_name_or_path={work}/model"]


def prepare(work: Path) -> None:
    """Images with captions, a small Stable Diffusion, and the configuration of a small network."""
    (work / "photos").mkdir()
    folder_of(IMAGES, work / "photos")
    pipeline = tiny_stable_diffusion(work / "tokenizer", vae_levels=2)
    pipeline.scheduler.register_to_config(num_train_timesteps=TIMESTEPS)
    pipeline.save_pretrained(work / "base")
    sizes: Any = {"sample_size": 16, "block_out_channels": (32, 32), "layers_per_block": 1}
    blocks: Any = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(**sizes, **blocks).save_config(work / "model")


def run(name: str, text: str, work: Path) -> dict[str, Any]:
    """What gate and ensemble say after the changed script."""
    prepare(work)
    file, made, usual = work / f"{name}.py", [], unrote.ShardEnsemble
    edited = changed(name, text)
    file.write_text(edited)

    def remembered(*args: Any, **options: Any) -> unrote.ShardEnsemble:
        made.append(usual(*args, **options))
        return made[0]

    unrote.ShardEnsemble = remembered  # type: ignore[assignment,misc]
    torch.manual_seed(0)
    with nullcontext() if find_spec("torchvision") else stand_in():
        spec = spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module: Any = module_from_spec(spec)
        sys.argv = [name, *given(name, work)]
        spec.loader.exec_module(module)
        module.main(*([module.parse_args()] if name == "train_unconditional" else []))
    (parts,) = made
    ledger = parts.gate.ledger
    lines = [line for line in unified_diff(text.splitlines(), edited.splitlines(), n=0) if line.startswith("+")]
    found = {
        "lines_added_or_changed": len(lines) - 1,  # the first names the file
        "rounds": parts.round_index,
        "batches": parts.gate.batches,
        "least_visits": int(ledger.visits.min()),
        "skips": int(ledger.skips.sum()),
        "moves": int(ledger.moves.sum()),
        "each_image_in_one_shard": torch.cat(list(parts.shards)).sort().values.tolist() == list(range(IMAGES)),
    }
    # Both parts of each of three rounds.
    if found["rounds"] != EPOCHS or found["least_visits"] != 2 * EPOCHS or not all(found.values()):
        raise SystemExit(f"{name}: {found}")
    return found


def main() -> None:
    """Run each script in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of diffusers")
    parser.add_argument("--out", type=Path, default=RESULTS / "diffusers_scripts.json")
    parser.add_argument("--one", choices=SCRIPTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        text = (arguments.checkout / "examples" / SCRIPTS[arguments.one]).read_text()
        with tempfile.TemporaryDirectory() as work:
            write_json(arguments.out, run(arguments.one, text, Path(work)))
        return
    commit = ["git", "-C", str(arguments.checkout), "rev-parse", "HEAD"]
    results = {"diffusers": version("diffusers"), "scripts_of": subprocess.check_output(commit, text=True).strip()}
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS:
            out = Path(folder) / f"{name}.json"
            subprocess.run([sys.executable, __file__, str(arguments.checkout), "--one", name, "--out", out], check=True)
            results[name] = json.loads(out.read_text())
    write_json(arguments.out, results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
