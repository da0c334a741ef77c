"""Sampling: image i is a function of the model, the seed and i."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from unrote.errors import InputError
from unrote.models.known import check_source, why_not_loaded
from unrote.models.task import RAW_VARIANT
from unrote.ranks import Ranks
from unrote.sample_folder import file_name, indices_in, pack, read_note, start, write_images, write_lines
from unrote.seeding import generator
from unrote.tensorfiles import weights_hash
from unrote.text.generation import PromptDenoiser, load_text_to_image
from unrote.text.prompts import Prompt, read_prompts
from unrote.training.run import Run
from unrote.versions import RESULT_VERSION

if TYPE_CHECKING:
    from unrote.guards.copy_filter import CopyFilter

logger = logging.getLogger("unrote")

Sampler = Literal["ddim", "ddpm", "dpm-solver++", "euler"]
Weights = Literal["ema", "raw"]


def sample(
    model: Run | Path | str,
    num: int | None = None,
    *,
    seed: int = 0,
    out: Path | str | None = None,
    sampler: Sampler | None = None,
    steps: int = 50,
    eta: float = 0.0,
    weights: Weights | None = None,
    prompts: Path | str | Sequence[str | Prompt] | None = None,
    guidance_scale: float = 7.5,
    negative_prompt: str | None = None,
    resolution: int | None = None,
    batch_size: int | None = None,
    guards: Sequence[str] = (),
    train: Any = None,
    device: torch.device | str = "cpu",
    distributed: bool = False,
) -> Path:
    """Generate images 0..num-1; what is already in ``out`` is not made again.

    Image i depends on the model, the seed, i and its prompt if there is one: not on ``num``, nor on what was made
    before. Floating-point kernels round differently for different batch shapes, so batches are always computed whole,
    and another ``batch_size`` may change a pixel by one level of 255.

    Args:
        model: a run folder, or a folder or Hub id of a diffusers pipeline: with a UNet2DModel, or with ``prompts``
            Stable Diffusion 1 to 3, XL or FLUX, also as one ``.safetensors`` file.
        num: how many images; by default one per prompt, or 256.
        seed: of the initial noise and of the samplers' own noise.
        out: a folder for PNG files and ``samples.jsonl``, or a path ending in ``.npz``; by default in the run folder.
        sampler: ``ddim`` (the default), ``ddpm`` (ancestral) or ``dpm-solver++``; of flow matching models ``euler``.
        steps: denoising steps.
        eta: DDIM's share of fresh noise, in [0, 1].
        weights: the averaged (``ema``) or the ``raw`` weights; by default what the run has, averaged if it has both.
        prompts: texts, or a file of them (:func:`unrote.text.prompts.read_prompts`), each for one image in turn.
        guidance_scale: with prompts: of classifier-free guidance; 1 and less is none.
        negative_prompt: with prompts: what guidance leads away from; by default the empty text.
        resolution: with prompts: height and width in pixels; by default what a run was trained at, or the pipeline's.
        batch_size: images denoised at once; by default 32, with prompts 4.
        guards: what keeps training images from coming back, as ``NAME[:key=value,…]`` each; see docs/guards.md. Image i
            depends on them too.
        train: the training images that guards compare with where they name none; by default those of the run.
        device: where to compute.
        distributed: every process of the initialized ``torch.distributed`` group calls this with the same arguments and
            makes its share of the batches; ``out`` is a folder that all of them see.

    Returns:
        The folder or file.

    Raises:
        InputError: if there is no such model or weights, or ``out`` holds samples made with other settings.
    """
    ranks = Ranks.here(distributed=distributed)
    texts = None if prompts is None else _texts(prompts)
    num = (256 if texts is None else len(texts)) if num is None else num
    batch_size = (32 if texts is None else 4) if batch_size is None else batch_size
    if num < 1 or steps < 1 or batch_size < 1:
        raise InputError(f"num, steps and batch_size must be at least 1, not {num}, {steps} and {batch_size}")
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be in [0, 1], not {eta}")
    source, run = pipeline_of(model)
    if run is None and weights is not None:
        raise InputError(f"--weights {weights}: {source} is no run folder, so its weights are taken as they are saved")
    weights = weights or ("ema" if run is None or run.config.training.use_ema else "raw")
    target = Path(out) if out is not None else (run.path if run else Path()) / "samples"
    if target.suffix == ".npz" and target.exists():
        raise InputError(f"--out {target}: exists already; remove it or choose another")
    takes_text = asks_for_text(source, run)
    if texts is None and takes_text:
        raise InputError(f"{source}: is a text-to-image model; give --prompts FILE, one prompt a line or .jsonl")
    if texts is not None and takes_text is False:
        raise InputError(f"--prompts: {run.path if run else source} is a model that takes no text")
    denoise: Denoiser | PromptDenoiser
    if texts is None:
        if negative_prompt is not None or resolution is not None:
            raise InputError("--negative-prompt and --resolution are for text-to-image models, with --prompts")
        unet, schedule = load_unet(source, run, weights)
        sampler = sampler or "ddim"
        denoise = Denoiser(unet.to(device).eval(), schedule, sampler, steps, eta, seed)
    else:
        pipeline = load_text_to_image(source, run, weights_variant(run, weights)).to(device)
        sampler, pipeline.scheduler = text_sampler(pipeline.scheduler, sampler, steps)
        denoise = PromptDenoiser(
            pipeline,
            texts,
            seed=seed,
            steps=steps,
            eta=eta,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            size=trained_size(run) if resolution is None else (resolution, resolution),
        )
    guarding = None
    if guards:
        from unrote.guards.making import make_guards  # the searches of an audit, which sampling alone does not need

        guarding = make_guards(guards, denoise, run, train=train, seed=seed, device=device)
    settings = {
        "schema_version": RESULT_VERSION,
        "model": str(source),
        "model_sha256": weights_hash(*denoise.networks),
        "weights": weights if run is not None else "as saved",
        "sampler": sampler,
        "steps": steps,
        "eta": eta,
        "seed": seed,
        "batch_size": batch_size,
        "guards": None if guarding is None else guarding.settings(),
        **denoise.settings,
    }
    copy_filter = None if guarding is None else guarding.copy_filter
    _generate(denoise, num, batch_size, settings, target, ranks, copy_filter)
    return target


def _generate(
    denoise: "Denoiser | PromptDenoiser",
    num: int,
    batch_size: int,
    settings: dict[str, Any],
    target: Path,
    ranks: Ranks,
    copy_filter: "CopyFilter | None",
) -> None:
    """Make the images that are not there yet, and what is written beside them."""
    folder = target.with_name(target.name + ".parts") if target.suffix == ".npz" else target
    if ranks.rank == 0:
        start(folder, settings)
    ranks.agree({key: value for key, value in settings.items() if key != "model"} | {"num": num})
    batches = [range(first, min(first + batch_size, num)) for first in range(0, num, batch_size)]
    there = [all((folder / file_name(i)).exists() for i in batch) for batch in batches]
    # As rank 0 saw it, since some may have begun; the processes then take turns in what is missing.
    missing = [batches[i] for i in np.flatnonzero(~ranks.of_first(np.array(there)))]
    mine = missing[ranks.rank :: ranks.world]
    quiet = True if ranks.rank else None
    with tqdm(total=sum(map(len, mine)), unit="img", desc="sampling", leave=False, disable=quiet) as bar:
        for wanted in mine:
            batch, notes = range(wanted.start, wanted.start + batch_size), None
            if copy_filter is None:
                pixels = denoise(batch)
            else:
                pixels, notes = copy_filter(denoise, batch)
            write_images(folder, wanted, pixels, notes)
            bar.update(len(wanted))
    ranks.barrier()
    if ranks.rank == 0:
        _list(denoise, num, settings, folder, target, filtered=copy_filter is not None)
    # Nobody returns before everything is there.
    ranks.barrier()


def _list(
    denoise: "Denoiser | PromptDenoiser",
    num: int,
    settings: dict[str, Any],
    folder: Path,
    target: Path,
    *,
    filtered: bool,
) -> None:
    """Write a line for every image, and pack the images if they go into one file."""
    # A folder may hold more than were asked for now; every image in it has its line.
    found = indices_in(folder) if folder == target else set[int]()
    rows = []
    for i in sorted(found | set(range(num))):
        note = {} if not filtered else read_note(folder / file_name(i))
        label = denoise.label_of(i, note.get("attempt", 0))
        rows.append({"index": i, "seed": settings["seed"], "file": file_name(i)} | label | note)
    write_lines(folder / "samples.jsonl", rows)
    captions = [{"file_name": row["file"], "text": row["prompt"]} for row in rows if "prompt" in row]
    if captions:
        # As in any folder of images with captions, so that they are found again.
        write_lines(folder / "metadata.jsonl", captions)
    if target.suffix == ".npz":
        pack(folder, num, target, [row["text"] for row in captions])


def make_scheduler(schedule: Any, sampler: Sampler, steps: int, **changes: Any) -> Any:
    """The sampler on a noise schedule, set to ``steps``.

    Args:
        schedule: a diffusers scheduler.
        sampler: see :func:`sample`.
        steps: see :func:`sample`.
        changes: to the schedule's configuration.

    Raises:
        InputError: there is no such sampler, or it can't spread the steps evenly.
    """
    # From the last timestep, where the image is noise alone, to the clean image: no start at 981, no end at ᾱ_0.
    common = {"timestep_spacing": "trailing", **changes}
    match sampler:
        case "ddim":
            scheduler: Any = DDIMScheduler.from_config(schedule.config, set_alpha_to_one=True, **common)
        case "ddpm":
            scheduler = DDPMScheduler.from_config(schedule.config, **common)
        case "dpm-solver++":
            scheduler = DPMSolverMultistepScheduler.from_config(
                schedule.config, algorithm_type="dpmsolver++", final_sigmas_type="zero", **common
            )
        case _:
            raise InputError(f"--sampler {sampler}: there are ddim, ddpm and dpm-solver++")
    count = scheduler.config.num_train_timesteps
    scheduler.set_timesteps(min(steps, count))
    # Rounded timesteps make diffusers' DDIM end at the first noise level instead of the clean image, and for some
    # counts give every sampler a step too many.
    if len(scheduler.timesteps) != steps or (sampler == "ddim" and count % steps):
        fitting = max(divisor for divisor in range(1, min(steps, count) + 1) if count % divisor == 0)
        raise InputError(f"--steps {steps}: {sampler} can't spread them evenly over {count}; use {fitting}")
    return scheduler


def text_sampler(schedule: Any, sampler: Sampler | None, steps: int) -> tuple[Sampler, Any]:
    """The sampler that was asked for, or the default, of a text-to-image pipeline."""
    flow = isinstance(schedule, FlowMatchEulerDiscreteScheduler)
    if flow and sampler not in (None, "euler"):
        raise InputError(f"--sampler {sampler}: a flow matching model is sampled by euler")
    if not flow and sampler == "euler":
        raise InputError("--sampler euler: is for flow matching models; there are ddim, ddpm and dpm-solver++")
    if flow:
        return "euler", FlowMatchEulerDiscreteScheduler.from_config(schedule.config)
    sampler = sampler or "ddim"
    return sampler, make_scheduler(schedule, sampler, steps, clip_sample=False)


class Denoiser:
    """A model with its sampler.

    Args:
        unet: the model.
        schedule: the noise schedule that it was trained with.
        sampler: see :func:`sample`.
        steps: see :func:`sample`.
        eta: see :func:`sample`.
        seed: see :func:`sample`.

    Attributes:
        label: the class of every image of a class-conditional model; None for all classes in turn.
    """

    def __init__(self, unet: Any, schedule: Any, sampler: Sampler, steps: int, eta: float, seed: int) -> None:
        self._unet, self._seed = unet, seed
        self._scheduler = make_scheduler(schedule, sampler, steps)
        self.guided = (unet, self._scheduler, lambda: 1.0)
        self.label: int | None = None
        self.shape: tuple[int, int, int] = (*[unet.config.sample_size] * 2, unet.config.in_channels)
        self._eta = {"eta": eta} if sampler == "ddim" else {}
        self.networks, self.settings = (unet,), dict[str, Any]()

    def label_of(self, index: int, attempt: int = 0) -> dict[str, Any]:
        """``{"label": …}`` of image ``index``; empty for an unconditional model."""
        classes = self._unet.config.num_class_embeds
        return {"label": index % classes if self.label is None else self.label} if classes else {}

    @torch.inference_mode()
    def __call__(self, indices: Sequence[int], attempt: int = 0) -> NDArray[np.uint8]:
        """The images ``indices``, uint8 [B, H, W, C]; another ``attempt`` gives others."""
        config, device = self._unet.config, self._unet.device
        shape = (1, config.in_channels, config.sample_size, config.sample_size)
        again = ("attempt", attempt) if attempt else ()
        draws = [generator(self._seed, "sample", index, *again) for index in indices]
        images = torch.cat([torch.randn(shape, generator=draw) for draw in draws]).to(device)
        images = images * self._scheduler.init_noise_sigma
        labels = [row["label"] for row in map(self.label_of, indices) if row]
        condition = torch.tensor(labels, device=device) if labels else None
        stochastic = {"generator": draws} if not isinstance(self._scheduler, DPMSolverMultistepScheduler) else {}
        self._scheduler.set_timesteps(len(self._scheduler.timesteps), device=device)
        timesteps = self._scheduler.timesteps
        return to_uint8(denoised(self._unet, self._scheduler, timesteps, images, condition, **stochastic, **self._eta))


def denoised(
    unet: Any, scheduler: Any, timesteps: Tensor, images: Tensor, labels: Tensor | None, **options: Any
) -> Tensor:
    """Noisy images [B, C, H, W], as noisy as the first of ``timesteps``, made clean.

    Args:
        unet: the model.
        scheduler: its sampler.
        timesteps: those of the sampler, or its last ones.
        images: what to begin with.
        labels: int64 [B] for a class-conditional model.
        options: of the sampler's step.
    """
    for timestep in timesteps:
        prediction = unet(scheduler.scale_model_input(images, timestep), timestep, class_labels=labels).sample
        images = scheduler.step(prediction, timestep, images, **options).prev_sample
    return images


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Float images [B, C, H, W] in [-1, 1] → uint8 [B, H, W, C], rounded to the nearest level."""
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round()
    return cast(NDArray[np.uint8], levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def pipeline_of(model: Run | Path | str) -> tuple[Path | str, Run | None]:
    """Where the pipeline is, and the run it belongs to, if any."""
    path = model.path if isinstance(model, Run) else Path(model)
    if (path / "config.yaml").exists():
        run = Run(path)
        if not run.finished:
            raise InputError(f"{path}: training is not finished; run the same `unrote train` command to go on")
        return run.model_folder, run
    check_source(str(path), "is neither a run folder nor a diffusers pipeline (no config.yaml, no model_index.json)")
    return (path if path.exists() else str(path)), None


def _texts(prompts: Path | str | Sequence[str | Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Path):
        return read_prompts(Path(prompts))
    if not prompts:
        raise InputError("prompts: there are none; give at least one text")
    return [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def trained_size(run: Run | None) -> tuple[int, int] | None:
    """Height and width in pixels that a run was trained at; None for no run."""
    return None if run is None else cast(tuple[int, int], tuple(run.data["shape"][:2]))


def asks_for_text(source: Path | str, run: Run | None) -> bool | None:
    """Whether the model is one of text to image; None if it is no model, which loading it says best."""
    if run is not None:
        return run.config.model.pretrained is not None
    if Path(source).is_file():
        return True
    try:
        return "text_encoder" in DiffusionPipeline.load_config(source)
    except Exception:  # what reads untrusted files raises anything
        return None


def weights_variant(run: Run | None, weights: Weights) -> str | None:
    """The diffusers variant that has these weights; None for those saved under the plain name."""
    if weights not in ("ema", "raw"):
        raise InputError(f"--weights {weights}: there are ema and raw")
    averaged = run is not None and run.config.training.use_ema
    if run is not None and weights == "ema" and not averaged:
        raise InputError(f"--weights ema: {run.path} was trained without EMA; use --weights raw")
    return RAW_VARIANT if weights == "raw" and averaged else None


def load_unet(source: Path | str, run: Run | None, weights: Weights) -> tuple[Any, Any]:
    """A UNet2DModel and its noise schedule. Raises InputError if there is none."""
    variant = weights_variant(run, weights)
    try:
        unet = UNet2DModel.from_pretrained(
            source, subfolder="unet", variant=variant, use_safetensors=True, low_cpu_mem_usage=False
        )
        return unet, DDPMScheduler.from_pretrained(source, subfolder="scheduler")
    except Exception as error:  # what reads untrusted files raises anything
        reason = why_not_loaded(source, error)
        raise InputError(f"{source}: no diffusers pipeline with a UNet2DModel can be loaded: {reason}") from None
