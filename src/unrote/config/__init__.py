"""The configuration of a training run."""

from unrote.config.loading import (
    changed_keys,
    differing,
    fields_of,
    load_config,
    merge,
    nearest,
    parse,
    parse_assignment,
    preset_names,
    preset_values,
    read_yaml,
    validated,
)
from unrote.config.sections import (
    METHODS,
    PARTS,
    Config,
    LoraConfig,
    ModelConfig,
    TextConfig,
)
from unrote.config.training import TrainingConfig

__all__ = [
    "METHODS",
    "PARTS",
    "Config",
    "LoraConfig",
    "ModelConfig",
    "TextConfig",
    "TrainingConfig",
    "changed_keys",
    "differing",
    "fields_of",
    "load_config",
    "merge",
    "nearest",
    "parse",
    "parse_assignment",
    "preset_names",
    "preset_values",
    "read_yaml",
    "validated",
]
