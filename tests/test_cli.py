# SPDX-License-Identifier: Apache-2.0
import re
from pathlib import Path

import pytest

from evit_jax import cli
from evit_jax.cli import (
    MODEL_FLAGS,
    Parser,
    add_model_flags,
    check_config,
    check_nothing_left,
    guard,
)
from evit_jax.errors import InputError

CONFIG = f"--config={Path(__file__).parents[1] / 'configs' / 'digits.py'}"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([CONFIG, "--config.model.keeprate=0.5"], "did you mean 'model.keep_rate'?"),
        ([CONFIG, "--config.lr=1"], "unknown configuration field 'lr'"),
        ([CONFIG, "--noconfig.augment.flipp"], "did you mean 'augment.flip'?"),
        (["--config", CONFIG[9:], "--config.lr=1"], "unknown configuration field 'lr'"),
        ([CONFIG + ":debgu"], "did you mean 'debug'?"),
        ([CONFIG.replace("digits", "digit")], "digits.py'?"),
    ],
)
def test_what_the_flags_library_would_trace_back_is_one_line(arguments, text):
    with pytest.raises(InputError) as error:
        check_config(arguments)
    assert text in str(error.value)


def test_good_arguments_pass():
    check_config([CONFIG + ":debug", "--config.model.keep_rate=0.5", "--workdir=x"])
    check_config(["--workdir=x"])
    check_nothing_left([])


def test_an_argument_that_is_no_flag_is_refused():
    with pytest.raises(InputError, match=r"unexpected argument 'keep_rate=0.5'"):
        check_nothing_left(["keep_rate=0.5"])


@pytest.mark.parametrize("error", [InputError("two\nlines"), OSError(28, "No space left", "file")])
def test_errors_are_one_line_and_a_status(error, capsys):
    def fail():
        raise error

    with pytest.raises(SystemExit) as exit_:
        guard(fail)
    assert exit_.value.code == 1
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_every_tool_has_a_model_flag_from_one_place():
    used = set()
    for path in (Path(cli.__file__).parent / "tools").glob("*.py"):
        text = path.read_text()
        assert not re.search(rf'add(_argument)?\("--({"|".join(MODEL_FLAGS)})"', text)
        for names in re.findall(r"add_model_flags\(parser, (.*)\)", text):
            used |= set(re.findall(r'"(\w+)"', names))
    assert used == set(MODEL_FLAGS)


def test_model_flags_are_none_where_they_are_left_out():
    parser = Parser("a tool")
    add_model_flags(parser, "model", "num_classes")
    flags = parser.parse_args(["--num_classes=10"])
    assert vars(flags) == dict(model=None, num_classes=10)
    assert MODEL_FLAGS["model"]["help"] in " ".join(parser.format_help().split())
    with pytest.raises(InputError, match="unrecognized arguments: --workdir=x"):
        parser.parse_args(["--workdir=x"])


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        guard(lambda: 1 / 0)
