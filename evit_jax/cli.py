# SPDX-License-Identifier: Apache-2.0
"""Runs a program's main so that bad input ends in one line and a non-zero exit."""

import re
import sys
from collections.abc import Callable

from absl import app, flags, logging

from evit_jax.errors import InputError, check_name
from evit_jax.recorder import flatten


def run(main: Callable[[], None]) -> None:
    """Parses the flags, calls `main` and exits; errors of input and of files are one line."""

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            fail(
                InputError(f"unexpected argument {arguments[1]!r}; fields are --config.NAME=VALUE")
            )
        logging.set_verbosity(logging.WARNING)  # Orbax tells every step of a save
        try:
            main()
        except (InputError, OSError) as error:
            fail(error)

    app.run(guarded, flags_parser=parse)


def parse(arguments: list[str]) -> list[str]:
    """absl's parser; what ml_collections raises for a wrong file or field becomes one line."""
    try:
        return app.parse_flags_with_usage(arguments)
    except (AttributeError, KeyError) as error:
        check_fields(arguments)
        raise error  # nothing we know of
    except (InputError, OSError) as error:
        fail(error)


def check_fields(arguments: list[str]) -> None:
    """Fails with the closest field if an override names one that the configuration lacks."""
    known = flatten(flags.FLAGS["config"].value.to_dict())
    for argument in arguments:
        if match := re.match(r"--(?:no)?config\.([^=]+)", argument):
            try:
                check_name("configuration field", match[1], known)
            except InputError as error:
                fail(error)


def fail(error: Exception) -> None:
    """Prints the error on one line of standard error and exits with status 1."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(1)
