"""A configuration put together: presets, files, methods and single settings, with errors that name the way out."""

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ValidationError

from unrote.config.base import Section
from unrote.config.older import CONFIG_VERSION, STEPS
from unrote.config.sections import METHOD_SETTINGS, METHODS, PARTS, Config
from unrote.errors import InputError
from unrote.versions import migrated

logger = logging.getLogger("unrote")
_S = TypeVar("_S", bound=Section)

TUNING = ("pretrained", "train", "lora.")
"""Fields of the model that a pretrained one does not bring along."""


def load_config(
    *,
    method: str | None = None,
    preset: str | None = None,
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Put a configuration together.

    Later ones win: defaults, preset, what the method sets besides, file, parts that the method enables, overrides.

    Args:
        method: one of :data:`METHODS`; by default what the preset names, else ``iet-agc+`` with a pretrained model and
            ``gap+`` without.
        preset: one of :func:`preset_names`; by default ``fine-tune`` with a pretrained model, ``tiny`` without.
        file: a YAML file with any of the fields.
        overrides: dotted field → value, e.g. ``{"gate.skip_ratio": 0.8}``.

    Raises:
        InputError: naming the file, the key and the nearest right one.
    """
    for key in ("method", "preset"):
        if key in (overrides or {}):
            raise InputError(f"{key} can't be set like a single setting, it chooses many; use --{key}")
    written: dict[str, Any] = {"version": CONFIG_VERSION}
    if file is not None:
        written = _present(read_yaml(file), str(file))
    model = written.get("model")
    # What is no mapping is left for validation to complain about.
    pretrained = model.get("pretrained") if isinstance(model, Mapping) else None
    tuned = (overrides or {}).get("model.pretrained") or pretrained
    preset = preset or written.get("preset") or ("fine-tune" if tuned else "tiny")
    chosen = preset_values(preset)
    tuned = tuned or chosen.get("model", {}).get("pretrained")
    given = dict.fromkeys(overrides or {})
    if not method and "method" not in written:  # a file that chooses no method may think of another default
        given |= dict.fromkeys(_flat(written))
    # Measured, not settled: docs/choosing.md.
    default = chosen.get("method", "iet-agc+" if tuned else "gap+")
    method = method or written.get("method", default)
    parts = _parts_of(method, written)
    values = merge(merge(chosen, _settings_of(method, chosen, bool(tuned))), written)
    values = merge(values, {"method": method, "preset": preset} | parts)
    for key, value in (overrides or {}).items():
        values = merge(values, _nest(key, value))
    config = parse(values, str(file) if file else "configuration")
    for key in given:
        section, _, field = key.partition(".")
        rounds = key == "ensemble.local_epochs" and config.monitor.every > 0
        if section in PARTS and field != "enabled" and not getattr(config, section).enabled and not rounds:
            logger.warning("%s is ignored: method %s does not enable %s", key, config.method, section)
        if section == "text" and config.model.pretrained is None:
            logger.warning("%s is ignored: only a pretrained model reads captions", key)
        if section == "model" and config.model.pretrained is not None and not field.startswith(TUNING):
            logger.warning("%s is ignored: %s is as it is", key, config.model.pretrained)
    return config


def parse(values: Mapping[str, Any], where: str) -> Config:
    """Validate nested ``values``; ``where`` names them in the error.

    A ``version`` among them is that of the file format, 1 if there is none; fields that it lacks have their defaults.

    Raises:
        InputError: naming each wrong key and what is allowed, or if the file is of a newer version.
    """
    return validated(Config, {key: value for key, value in _present(values, where).items() if key != "version"}, where)


def _present(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``values`` as a file of the present version has them. Raises InputError if they are of none or a newer one."""
    version = values.get("version", 1)
    # YAML reads `yes` as True, which is a whole number to Python.
    if type(version) is not int or version < 1:
        raise InputError(f"{where}: version must be a whole number such as {CONFIG_VERSION}, not {version!r}")
    return migrated(dict(values), version, STEPS, where) | {"version": CONFIG_VERSION}


def validated(section: type[_S], values: Mapping[str, Any], where: str) -> _S:
    """``values`` as a ``section``; ``where`` names them in the error.

    Raises:
        InputError: naming each wrong key and what is allowed.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        fields = [row[0] for row in fields_of(section)]
        problems = [_explain(problem, fields) for problem in error.errors()]
        raise InputError(f"{where}: " + "; ".join(problems)) from None


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("unrote") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_values(name: str) -> dict[str, Any]:
    """What a preset sets. Raises InputError if there is none of that name."""
    if name not in preset_names():
        raise InputError(f"there is no preset {name!r}{nearest(name, preset_names())}; `unrote presets` lists them")
    text = (resources.files("unrote") / "presets" / f"{name}.yaml").read_text("utf-8")
    return cast(dict[str, Any], yaml.safe_load(text))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises InputError if it can't be read or holds something else."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path}: can't be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: must hold a mapping of fields, as `unrote config show` prints")
    return values


def parse_assignment(text: str) -> tuple[str, Any]:
    """``"gate.skip_ratio=0.8"`` → ``("gate.skip_ratio", 0.8)``. Raises InputError if it can't be read like that."""
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--set {text}: write it as key=value, e.g. --set gate.skip_ratio=0.8")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise InputError(
            f"--set {text}: the value is no YAML; put a string with special characters in quotes"
        ) from None


def fields_of(section: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """Every field as (dotted name, type, default, description)."""
    rows = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, Section):
            rows += fields_of(annotation, f"{prefix}{name}.")
        else:
            kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
            rows.append((prefix + name, kind, field.default, field.description or ""))
    return rows


def changed_keys(old: Config, new: Config) -> list[str]:
    """Lines ``key: old -> new`` for what differs between two configurations."""
    return [f"{key}: {before} -> {after}" for key, (before, after) in differing(old, new).items()]


def differing(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The values of both, by dotted key, where they differ."""
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    return {key: (before.get(key), after[key]) for key in after if before.get(key) != after[key]}


def nearest(word: object, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"``, or nothing if no known word is near."""
    match = difflib.get_close_matches(str(word), list(known), 1, 0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with ``over`` winning; a section that is empty there (None in YAML) sets nothing."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping | None):
            result[key] = merge(old, value or {})
        else:
            result[key] = value
    return result


def _parts_of(method: str, written: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that ``method`` turns on or off, but for those that the user's file sets itself."""
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"there is no method {method!r}{nearest(method, METHODS)}; there are {', '.join(METHODS)}")
    sections = {part: {} if written.get(part) is None else written[part] for part in PARTS}
    # What is no mapping is left for validation to complain about.
    unset = [part for part in PARTS if isinstance(sections[part], Mapping) and "enabled" not in sections[part]]
    return {part: {"enabled": part in METHODS[method]} for part in unset}


def _settings_of(method: str, preset: Mapping[str, Any], tuned: bool) -> dict[str, Any]:
    """What ``method`` sets besides its parts, over those of a preset."""
    settings = METHOD_SETTINGS.get(method, {})
    if "augmentation" not in settings:
        return settings
    # What may be done to images is known by whoever knows the images.
    own: dict[str, Any] = {"ops": preset.get("augmentation", {}).get("ops", {})}
    # A pretrained model can't be told what was done to an image.
    return merge(settings, {"augmentation": own | ({"labels": False} if tuned else {})})


def _nest(key: str, value: Any) -> dict[str, Any]:
    head, dot, rest = key.partition(".")
    return {head: _nest(rest, value) if dot else value}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


_PROBLEMS = {
    "missing": "is missing",
    "model_type": "is a section of settings, not a value",
    "tuple_type": "must be a list, such as [1, 2]",
}
"""Where pydantic's words are those of a programmer."""


def _explain(problem: Any, fields: Sequence[str]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        sections = {field.rpartition(".")[0] for field in fields} - {""}
        known = [name for name in [*fields, *sorted(sections)] if not key.startswith(f"{name}.")]
        return f"there is no key {key!r}{nearest(key, known)}"
    if problem["type"] in _PROBLEMS:
        return f"{key}: {_PROBLEMS[problem['type']]}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key}: {message}, not {problem['input']!r}" if key else message
