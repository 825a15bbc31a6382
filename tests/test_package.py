# SPDX-License-Identifier: Apache-2.0
"""`import evit_jax` and `python -m evit_jax`."""

import subprocess
import sys


def python(*arguments):
    """A process with these arguments, which has to succeed: its standard output."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def test_importing_the_package_waits_for_neither_optax_nor_orbax():
    code = "import sys, evit_jax; print('optax' in sys.modules, 'orbax' in sys.modules)"
    assert python("-c", code) == "False False\n"
