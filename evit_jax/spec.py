# SPDX-License-Identifier: Apache-2.0
"""Settings written in one word: "keep_rate=0.5,debug", "evit:fuse=False" and "3,6,9"."""

from evit_jax.errors import InputError

WORDS = {"True": True, "False": False, "None": None}


def parse_fields(text: str) -> dict[str, bool | int | float | str | None]:
    """ "r=13,fuse=False,debug" -> {"r": 13, "fuse": False, "debug": True}."""
    return dict(parse_field(item.strip()) for item in text.split(",") if item.strip())


def split_specs(text: str) -> list[str]:
    """ "evit,tome:r=13,linear=0.5" -> ["evit", "tome:r=13,linear=0.5"].

    A comma separates specs, except that FIELD=VALUE goes with the spec before it.
    """
    specs: list[str] = []
    for item in filter(None, map(str.strip, text.split(","))):
        name, equals, _ = item.partition("=")
        if specs and equals and ":" not in name:
            specs[-1] += f",{item}"
        else:
            specs.append(item)
    return specs


def parse_field(item: str) -> tuple[str, bool | int | float | str | None]:
    """One of them; whole numbers, numbers, True, False and None are recognized."""
    name, equals, text = item.partition("=")
    if not equals:
        return name, True
    for convert in (WORDS.__getitem__, int, float):
        try:
            return name, convert(text)
        except (KeyError, ValueError):
            continue
    return name, text


def numbers(text: str, kind: type) -> tuple:
    """ "1,0.7" -> (1.0, 0.7)."""
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError:
        raise InputError(f"expected numbers with commas between them, got {text!r}") from None


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """ "224" -> (224,) and "224,320" -> (224, 320), height first; "" and None -> None."""
    if not text:
        return None
    try:
        sides = numbers(text, int)
    except InputError:
        sides = ()
    if len(sides) not in (1, 2):
        raise InputError(f"--image_size must be like 224, or 224,320 (height,width); got {text!r}")
    return sides


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
