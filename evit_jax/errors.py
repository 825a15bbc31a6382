# SPDX-License-Identifier: Apache-2.0
"""The one exception for bad input, and how a wrong name finds the right one."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user asked for something impossible; the text says what is wrong and what to do.

    Command-line programs print it as one line, without a traceback.
    """


def check_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Returns `name` if it is among `known`, else raises InputError naming the closest one.

    All of them are listed where they are few or none is close.
    """
    known = sorted(known)
    if name in known:
        return name
    close = difflib.get_close_matches(str(name), known, n=1)
    hints = [f"did you mean {close[0]!r}?"] if close else []
    if len(known) <= 12 or not close:
        hints.append(f"known: {', '.join(known)}")
    raise InputError(f"unknown {kind} {name!r}; {' '.join(hints)}")


def check_names(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises InputError for the first of `names` that is not among `known`."""
    known = list(known)
    for name in names:
        check_name(kind, name, known)
