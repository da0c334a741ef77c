"""What ``import unrote`` offers to train."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from unrote.config import Config, load_config
from unrote.data import ImageStore
from unrote.device import pick_device
from unrote.training.images import training_images, watched_against
from unrote.training.loop import train as _train
from unrote.training.plan import Plan, existing_parent, make_plan
from unrote.training.precision import settled
from unrote.training.probe import measure
from unrote.training.run import Run


def train(
    data: Any,
    *,
    out: Path | str,
    method: str | None = None,
    preset: str | None = None,
    config: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> Run:
    """Train a diffusion model; the same call again goes on where it was interrupted.

    Args:
        data: anything :func:`unrote.open_images` takes: a folder, an ``.npz``, a named set, a Hugging Face or torch
            data set.
        out: the run folder.
        method: ``standard``, ``agc``, ``iet``, ``iet-agc``, ``iet-agc+``, ``gap`` or ``gap+``; by default what the
            preset names, else ``gap+``, with a pretrained model ``iet-agc+``.
        preset: where the other settings come from; ``tiny`` by default.
        config: a YAML file of settings.
        settings: dotted field → value, e.g. ``{"gate.skip_ratio": 0.8}``; these win.
        device: ``cpu``, ``cuda``, …; by default what there is.

    Returns:
        The finished run.

    Raises:
        InputError: if data, settings and folder do not fit together; nothing is changed then.
    """
    source = {"data.source": str(data)} if isinstance(data, str | Path) else {"data.source": type(data).__name__}
    loaded = load_config(
        method=method,
        preset=preset,
        file=Path(config) if config else None,
        overrides={**source, **(settings or {})},
    )
    return train_config(loaded, training_images(loaded, data), out, device)


def train_config(config: Config, images: ImageStore, out: Path | str, device: str | None = None) -> Run:
    """Train ``config`` on ``images``; see :func:`train`."""
    run, where = Run(Path(out)), pick_device(device)
    config = settled(config, run, where)
    looks = make_plan(config, images, run.path).looks
    _train(config, images, run, where, looks)
    return run


def plan(
    config: Config,
    data: Any,
    out: Path,
    *,
    processes: int = 1,
    device_memory: int | None = None,
    device: str | None = None,
    probe: bool = False,
) -> Plan:
    """Validate a run without starting it; see :func:`unrote.training.plan.make_plan`. A small disk is a warning.

    Args:
        config: of the run.
        data: anything :func:`unrote.open_images` takes.
        out: the run folder.
        processes: W, that the proxies are dealt out to; if there are more, they share them.
        device_memory: bytes that each process has where it computes; None does not compare.
        device: where the run computes; by default what there is.
        probe: time a few steps here and estimate how long the run takes.
    """
    images, where = training_images(config, data), pick_device(device)
    config = settled(config, Run(out), where)
    options: dict[str, Any] = {"processes": processes, "device_memory": device_memory, "device": where.type}
    found = make_plan(config, images, out, only_plan=True, **options)
    if found.looks is not None:
        watched_against(config, images)
    return replace(found, probe=measure(config, images, existing_parent(out), where)) if probe else found
