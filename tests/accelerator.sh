#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Every figure that an accelerator is needed for, in one command and under ten minutes:
#   tests/accelerator.sh [REFERENCE] [--resume=results.json] [--rehearse]
# REFERENCE is a checkout of https://github.com/youweiliang/evit. Tables and results.json go to
# $OUT, default ./accelerator_results; tests/accelerator/__main__.py says what they hold.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PYTHONPATH PYTHONUNBUFFERED
exec "${PYTHON:-python3}" -m tests.accelerator --out="${OUT:-./accelerator_results}" "$@"
