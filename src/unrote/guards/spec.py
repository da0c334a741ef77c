"""What ``--guard NAME[:key=value,…]`` says."""

import math
import re
from dataclasses import dataclass

from unrote.config import nearest
from unrote.errors import InputError

Kind = type[int] | type[float] | type[str]

GUARDS: dict[str, dict[str, Kind]] = {
    "copy-filter": {"train": str, "tries": int, "threshold": float, "holdout": str, "rate": float, "encoder": str},
    "amg": {"train": str, "threshold": float, "strength": float, "despecify": float, "deduplicate": float},
    "random-tokens": {"count": int},
    "repeat-words": {},
    "embedding-noise": {"std": float},
    "prompt-optimization": {"target": float, "steps": int, "lr": float},
    "attention": {"scale": float},
}
"""The guards and their settings."""


@dataclass(frozen=True)
class Spec:
    """One guard as it was asked for.

    Attributes:
        name: a key of :data:`GUARDS`.
        values: what was set, in the types of :data:`GUARDS`.
    """

    name: str
    values: dict[str, int | float | str]


def parse_guard(text: str) -> Spec:
    """``copy-filter:tries=4,threshold=0.3`` as a guard.

    A value goes on to the next ``,key=``, so that paths may have commas.

    Raises:
        InputError: there is no such guard or setting, or a value is no number where one is due.
    """
    name, colon, rest = text.partition(":")
    if name not in GUARDS:
        raise InputError(f"--guard {name}: there is none{nearest(name, GUARDS)}; there are {', '.join(GUARDS)}")
    values: dict[str, int | float | str] = {}
    for part in re.split(r",(?=[a-z_]+=)", rest) if colon else []:
        key, equals, value = part.partition("=")
        if key not in GUARDS[name]:
            known = ", ".join(GUARDS[name]) or "none"
            raise InputError(
                f"--guard {name}: there is no setting {key!r}{nearest(key, GUARDS[name])}; there are {known}"
            )
        if not equals or not value:
            raise InputError(f"--guard {name}: write {key}=VALUE")
        if key in values:
            raise InputError(f"--guard {name}: {key} is given twice")
        values[key] = _number(name, key, value)
    return Spec(name, values)


def _number(name: str, key: str, value: str) -> int | float | str:
    kind = GUARDS[name][key]
    try:
        number = kind(value)
        if not isinstance(number, str) and not math.isfinite(number):
            raise ValueError(value)
    except ValueError:
        what = "a whole number" if kind is int else "a finite number"
        raise InputError(f"--guard {name}: {key} is {value!r}, not {what}") from None
    return number
