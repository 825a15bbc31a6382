# SPDX-License-Identifier: Apache-2.0
"""Runs a program's main so that bad input ends in one line and a non-zero exit."""

import argparse
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, logging

from evit_jax.errors import InputError, check_name
from evit_jax.runtime import compilation_cache, processes
from evit_jax.spec import flatten


def run(main: Callable[[], None]) -> None:
    """Parses the flags, calls `main` and exits; errors of input and of files are one line."""

    def parse(arguments: list[str]) -> list[str]:
        exit_on_error(lambda: check_config(arguments[1:]))
        return app.parse_flags_with_usage(arguments)

    def guarded(arguments: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        exit_on_error(lambda: check_nothing_left(arguments[1:]))
        guard(main)

    app.run(guarded, flags_parser=parse)


# Those of the tools that say which model it is and how it runs. What a tool leaves out is the
# model's own, or that of the run in --workdir.
MODEL_FLAGS = dict(
    model=dict(
        metavar="NAME", help="a name, a folder, or sizes: vit:width=192,depth=6,num_heads=3"
    ),
    weights=dict(
        metavar="FILE", help=".safetensors, .pth, .npz, a folder, or hf:OWNER/REPO@COMMIT"
    ),
    workdir=dict(metavar="DIR", help="of a training run, instead of --model and --weights"),
    reducer=dict(metavar="SPEC", help="evit (the default), evit:fuse=False, random, tome:r=13"),
    plan=dict(metavar="FILE", help="counts and their reducer, as calibrate writes them"),
    layers=dict(metavar="LIST", help="reducing blocks, such as 3,6,9; default the reducer's own"),
    multiple_of=dict(metavar="N", help="tokens rounded up to multiples of it; default 1"),
    image_size=dict(metavar="SIZE", help="224 or 224,320 (height,width); default the model's own"),
    num_classes=dict(metavar="N", type=int, help="where it is not what the model's name says"),
    dtype=dict(help="of the computation: float32 (the default), bfloat16 or float16"),
)


def add_model_flags(parser: argparse.ArgumentParser, *names: str, several: bool = False) -> None:
    """Adds these of MODEL_FLAGS; each is None where the command line leaves it out.

    `training.trained.open_spec` makes a model of what was parsed.

    Args:
      several: each may be given more than once, and is a list.
    """
    more = dict(action="append") if several else {}
    for name in names:
        parser.add_argument(f"--{name}", **MODEL_FLAGS[name], **more)


class Parser(argparse.ArgumentParser):
    """For the tools: --help is the module's docstring, bad arguments are like other bad input."""

    def __init__(self, description: str):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str):
        raise InputError(f"{message}; --help explains them")


def guard(main: Callable[[], None]) -> None:
    """Calls a program's main with compiled programs kept; errors as in `exit_on_error`."""
    compilation_cache.turn_on()
    exit_on_error(main)


def exit_on_error(function: Callable[[], None]) -> None:
    """Calls it; prints an error of the input or of a file on one line and exits with status 1."""
    try:
        function()
    except (InputError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        if jax.distributed.is_initialized():
            processes.leave(1)
        sys.exit(1)


def check_nothing_left(arguments: list[str]) -> None:
    """Raises InputError for an argument that no flag took."""
    if arguments:
        raise InputError(f"unexpected argument {arguments[0]!r}; fields are --config.NAME=VALUE")


def check_config(arguments: list[str]) -> None:
    """Raises InputError where ml_collections would answer with a traceback.

    That is a file that is not there, an argument behind its colon that it does not know, and a
    field to override that it does not have; each names the closest there is.
    """
    line = re.sub(r"(^|\n)--?(config)\n", r"\1--\2=", "\n".join(arguments))  # --config FILE
    given = re.findall(r"(?:^|\n)--?config=(.*)", line)
    if not given:
        return  # absl says that the flag is missing
    name, _, argument = given[-1].partition(":")
    if not Path(name).is_file():
        check_name("config", name, map(str, Path(name).parent.glob("*.py")))
    config = runpy.run_path(name)["get_config"](*([argument] if argument else []))
    known = flatten(config.to_dict())
    for text in arguments:
        if match := re.match(r"--?(?:no)?config\.([\w.]+)", text):
            check_name("configuration field", match[1], known)
