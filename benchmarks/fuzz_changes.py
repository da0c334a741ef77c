"""How the inputs of fuzz.py are changed at random: bytes, and the values of JSON."""

import json
import random
from typing import Any

TOKENS = [
    b"../", b"/etc/passwd", b"\x00", b"\xff\xfe", b"1e999", b"-1", b"NaN", b"9" * 400, b"[" * 3000, b"{" * 300, b'"',
    b"null", b"!!python/object/apply:os.system ['false']", b"&a [*a, *a]", b"<<: *a", b"\xed\xa0\x80", b"=cmd()",
    b"\r\n", b": ", b"- ", b"\\ud800", b"../" * 100,
]  # fmt: skip
VALUES = [None, True, -1, 0, 1e999, 10**30, "", "x", "../../x", "\0", "\ud800", [], {}, [[]], {"": None}]


def mutated(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """``content`` after one to six changes."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        at = draw.randrange(len(data) + 1)
        size = min(draw.choice((1, 2, 4, 16, 200)), len(data) - at)
        match draw.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                data[at : at + size] = draw.randbytes(size)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size] * draw.choice((1, 2, 50))
            case 4:
                del data[at:]
            case 5:
                data[at : at + 4] = draw.choice((b"\x00" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00\x00\x00\x80"))
            case 6:
                data[at : at + draw.choice((0, size))] = draw.choice(TOKENS)
            case 7:
                data[at:] = draw.choice(others)[at:]
    return bytes(data)


def changed_json(content: bytes, draw: random.Random) -> bytes:
    """JSON with one value, somewhere, replaced or removed; bytes that are none are given back."""
    try:
        values = json.loads(content)
    except ValueError:
        return content
    places = list(_places(values))
    if not places:
        return json.dumps(draw.choice(VALUES)).encode()
    container, key = draw.choice(places)
    if draw.random() < 0.3:
        del container[key]
    else:
        container[key] = draw.choice(VALUES)
    return json.dumps(values).encode()


def changed(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """Either kind of change, that of JSON for JSON only."""
    whole = changed_json(content, draw) if draw.random() < 0.5 else content
    return whole if whole != content else mutated(content, draw, others)


def _places(values: Any) -> Any:
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield values, key
            yield from _places(value)
