# SPDX-License-Identifier: Apache-2.0
"""The tools of evit_jax, each with --help:"""

import ast
from pathlib import Path

from evit_jax import cli

TOOLS = Path(__file__).with_name("tools")


def listing() -> str:
    """A line for each tool: how to start it, and the first line of its docstring."""
    lines = {}
    for path in sorted(TOOLS.glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        lines[f"python -m evit_jax.tools.{path.stem}"] = text.partition("\n")[0]
    width = max(map(len, lines))
    return "\n".join(f"{command.ljust(width)}  {text}" for command, text in lines.items())


def main() -> None:
    text = f"{__doc__}\n\n{listing()}"
    parser = cli.Parser(text)
    parser.prog = "python -m evit_jax"
    parser.parse_args()
    print(text)


if __name__ == "__main__":
    cli.exit_on_error(main)
