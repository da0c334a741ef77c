"""Seeds as a pure function of what they are for, so that no generator state need ever be saved."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from ``parts``, e.g. ``(seed, "noise", proxy, step)``.

    The same parts give the same seed on every platform; different parts give independent ones.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on ``device`` seeded by :func:`derive_seed` of ``parts``."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))
