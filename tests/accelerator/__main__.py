# SPDX-License-Identifier: Apache-2.0
"""Every figure that an accelerator is needed for, most valuable first, within a budget of time.

tests/accelerator.sh [REFERENCE] [--out=DIR] [--budget=540] [--resume=results.json] [--rehearse]

On a GPU or TPU machine with the project's JAX; where its python3 has torch and timm as well (and
torch sees the GPU), DeiT of timm and, with a REFERENCE checkout of
https://github.com/youweiliang/evit, the official EViT run beside ours: autocast to bfloat16, plain
and torch.compile'd, AdamW fused. Nothing is downloaded or installed.

  speed        DeiT-S and DeiT-B in bfloat16: dense, EViT at 0.7 and 0.5, ToMe at the
               multiply-accumulates of EViT at 0.7; batches of 1, 64, 256 and 1024; inference, and
               training steps (forward, backward, AdamW). All variants of a case, PyTorch's in a
               process beside, take turns of queued calls, every other round backwards; at batch 1
               once more with each call awaited. Figures are medians of rounds.
  peak         the fastest matrix product and copy, which the shares are of
  correctness  logits in bfloat16 beside float32, float32 beside the CPU's; the tests of the
               attention's forms, run on the device
  attention    the attention branch in the model's form, the CPU's, and by
               `jax.nn.dot_product_attention` with XLA and cuDNN, at the model's token counts
  profile      the kernels that take most of the time

results.json and tables.md in DIR are written after every part. A part that fails leaves its error
and the next one goes on; one that no longer fits into --budget (seconds) is listed as skipped, and
a second run with --resume, the first one's results.json, measures those. --rehearse runs all of it
on a tiny model in about a minute, on a CPU too.
"""

import argparse
from pathlib import Path

from tests.accelerator.session import Session


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", nargs="?", default="")
    parser.add_argument("--out", default="./accelerator_results")
    parser.add_argument("--budget", type=float, default=540)
    parser.add_argument("--resume", default="")
    parser.add_argument("--rehearse", action="store_true")
    flags = parser.parse_args()
    if flags.reference and not (Path(flags.reference) / "evit.py").is_file():
        parser.error(f"{flags.reference} has no evit.py; give a checkout of youweiliang/evit")
    session = Session(flags)
    try:
        session.run()
    finally:
        session.close()
    print((session.out / "tables.md").read_text())


if __name__ == "__main__":
    main()
