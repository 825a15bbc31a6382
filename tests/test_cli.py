# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from evit_jax.cli import check_config, check_nothing_left, guard
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


def test_our_own_mistakes_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        guard(lambda: 1 / 0)
