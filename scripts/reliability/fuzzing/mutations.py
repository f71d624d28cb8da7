"""Damage to files: to any bytes, to fields of a header, and to values of JSON. All draws come from one generator."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

INTEGERS = (0, 1, -1, 2, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, -(2**31), 2**32 - 1, 2**40, 2**63 - 1)
FLOATS = (0.0, -0.0, 1e-45, 1e-10, -1.0, 1e10, 3.4e38, float("nan"), float("inf"), float("-inf"))
# What stands in a text in place of a number or a word.
WORDS = (*(str(n) for n in INTEGERS), "nan", "inf", "-inf", "1e308", "1e-308", "", "x", "9" * 400, "\x00", "ü", "../x")
LONGEST_INSERT = 64
# Deeper than the stack of a recursive parser.
DEEP = 100_000
# Two letters that name a DICOM element's type, between its tag and its length.
DICOM_ELEMENT = re.compile(
    rb"(?s)[\x00-\xff]{4}(?=AE|AS|AT|CS|DA|DS|DT|FD|FL|IS|LO|LT|OB|OW|PN|SH|SL|SQ|SS|ST|TM|UI|UL|UN|US|UT)"
)
DICOM_TYPES = (b"DS", b"IS", b"US", b"UL", b"FD", b"SQ", b"OB", b"OW", b"UN", b"UT", b"UI", b"AT", b"ZZ")
LONG_LENGTHS = (b"OB", b"OW", b"SQ", b"UN", b"UT")


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """One fault of storage or transfer: flipped bits, boundary values, a cut end, or a moved, lost or added block."""
    if not data:
        return rng.randbytes(8)
    buffer = bytearray(data)
    # Half of the faults hit the beginning, where headers are.
    at = rng.randrange(min(len(data), 400) if rng.random() < 0.5 else len(data))
    size = min(len(data) - at, rng.choice((1, 2, 4, 8, rng.randint(1, len(data)))))
    kind = rng.randrange(7)
    if kind == 0:
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            buffer[rng.randrange(len(buffer))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        buffer[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 254, 255))])
    elif kind == 2:
        value = packed(rng.choice(("<h", "<i", "<q", ">i", "<f", "<d")), rng)
        buffer[at : at + len(value)] = value
    elif kind == 3:
        del buffer[at:]
    elif kind == 4:
        del buffer[at : at + size]
    elif kind == 5:
        buffer[at:at] = buffer[at : at + size]
    else:
        length = rng.randint(1, LONGEST_INSERT)
        buffer[at:at] = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return bytes(buffer)


def packed(code: str, rng: Random) -> bytes:
    """A boundary value as a number of this type, a code of ``struct``."""
    kind = code[-1]
    if kind in "fd":
        value = rng.choice((*FLOATS, float(rng.choice(INTEGERS))))
        return struct.pack(code, value)
    number, bits = rng.choice(INTEGERS), 8 * struct.calcsize(code)
    number %= 2**bits
    return struct.pack(code, number - 2**bits if kind.islower() and number >= 2 ** (bits - 1) else number)


def mutate_fields(data: bytes, rng: Random, fields: dict[str, tuple[int, str]]) -> bytes:
    """Set a field of a binary header to a boundary value.

    Args:
        data: the file.
        rng: all draws come from it.
        fields: offset in bytes and code of ``struct`` of each field, by its name.
    """
    offset, code = fields[rng.choice(sorted(fields))]
    value = packed(code, rng)
    return data[:offset] + value + data[offset + len(value) :]


def mutate_text(data: bytes, rng: Random, end: int) -> bytes:
    """Change, drop or double a line of a text header that ends at ``end``, or one word of it."""
    lines = data[:end].split(b"\n")
    index = rng.randrange(len(lines))
    kind = rng.randrange(5)
    if kind == 0:
        del lines[index]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines)), lines[index])
    else:
        words = re.split(rb"([\s:=(),]+)", lines[index])
        # The first word is the field's name, which is spared more often than not.
        first = 2 if len(words) > 2 and rng.random() < 0.8 else 0
        words[rng.randrange(first, len(words))] = rng.choice(WORDS).encode()
        lines[index] = b"".join(words)
    return b"\n".join(lines) + data[end:]


def mutate_dicom(data: bytes, rng: Random) -> bytes:
    """Change the value, length, type or number of an element of a DICOM file with explicit types."""
    starts = [match.start() for match in DICOM_ELEMENT.finditer(data, 132)]
    if not starts:
        return mutate_bytes(data, rng)
    index = rng.randrange(len(starts))
    start = starts[index]
    end = starts[index + 1] if index + 1 < len(starts) else len(data)
    long = data[start + 4 : start + 6] in LONG_LENGTHS
    head = 12 if long else 8
    element, kind = bytearray(data[start:end]), rng.randrange(6)
    if kind == 0:
        element[8 if long else 6 : head] = packed("<I" if long else "<H", rng)
    elif kind == 1:
        element[4:6] = rng.choice(DICOM_TYPES)
    elif kind == 2:
        element = bytearray()
    elif kind == 3:
        element = element * 2
    else:
        value = (rng.choice(WORDS).encode() + b" " * 1024)[: len(element) - head]
        if kind == 4 and len(element) - head in (2, 4, 8):
            value = packed({2: "<H", 4: rng.choice(("<I", "<f")), 8: "<d"}[len(element) - head], rng)
        if len(value) == len(element) - head:
            element[head:] = value
    return data[:start] + bytes(element) + data[end:]


def odd_value(value: Any, rng: Random) -> Any:
    """A value of another type, or out of any range, in place of a value of JSON."""
    kind = rng.randrange(8)
    if kind < 2:
        return rng.choice(INTEGERS)
    if kind == 2:
        return rng.choice(FLOATS)
    if kind == 3:
        return rng.choice(WORDS)
    if kind == 4:
        return rng.choice((None, True, False, [], {}, [None], {"": None}, [[]]))
    if kind == 5:
        return [value] * rng.choice((1, 2, 3, 1000))
    if kind == 6:
        return {rng.choice(WORDS): value}
    return -value if isinstance(value, (int, float)) else str(value)


def mutate_value(value: Any, rng: Random) -> Any:
    """JSON in which one entry, at any depth, has another value, another name, or is gone."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.05:
        return odd_value(value, rng)
    copy: Any = value.copy()
    key = rng.choice([*copy]) if isinstance(copy, dict) else rng.randrange(len(copy))
    kind = rng.random()
    if kind < 0.1:
        del copy[key]
    elif kind < 0.2 and isinstance(copy, dict):
        copy[rng.choice((*WORDS, *copy))] = copy.pop(key)
    elif kind < 0.25:
        other = rng.choice([*copy]) if isinstance(copy, dict) else rng.randrange(len(copy))
        copy[key] = copy[other]
    else:
        copy[key] = mutate_value(copy[key], rng)
    return copy


def mutate_json(data: bytes, rng: Random) -> bytes:
    """A JSON text with other values, or nested too deeply; or one with faults of storage."""
    kind = rng.random()
    if kind < 0.2:
        return mutate_bytes(data, rng)
    if kind < 0.22:
        opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
        return opening * DEEP + b"0" + closing * DEEP
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    text = json.dumps(mutate_value(value, rng), ensure_ascii=rng.random() < 0.5)
    # Numbers that json.dumps does not write.
    for plain, huge in (("1099511627776", "1" * 5000), ("65535", "1e999")):
        if rng.random() < 0.3:
            text = text.replace(plain, huge)
    return text.encode("utf-8", "surrogatepass")
