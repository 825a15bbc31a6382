# SPDX-License-Identifier: Apache-2.0
"""Images per second beside the official PyTorch EViT, on the same machine.

git clone https://github.com/youweiliang/evit
python -m tests.scripts.compare_reference --reference=evit --python=TORCH_ENVIRONMENT/bin/python \\
    [--batch_sizes=1,8,32] [--keep_rates=1,0.7] [--training] [--rounds=9]

Each side has a process of its own and waits while the other has its turn of several warm calls: in
one process PyTorch's threads, which spin, slow JAX's. A turn's figure is the mean of its calls
after one that is not counted; every other round begins with the other side. DeiT-S, float32, fused
tokens; in training a step with label smoothing and AdamW. TORCH_ENVIRONMENT needs torch and timm.
The last line of standard output is a JSON object: medians, lowest and highest of the rounds.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import time
import types

import numpy as np


def reference(folder: str, *, keep_rate: float, batch_size: int, training: bool):
    """A call of the official model; runs where torch is."""
    sys.modules["torchprofile"] = types.SimpleNamespace(profile_macs=None)  # imported, not used
    sys.path.insert(0, folder)
    import evit
    import torch

    torch.manual_seed(0)
    rates = [keep_rate if block in (3, 6, 9) else 1 for block in range(12)]
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    sizes = dict(patch_size=16, embed_dim=384, depth=12, num_heads=6, qkv_bias=True)
    model = evit.EViT(**sizes, norm_layer=norm, keep_rate=rates, fuse_token=True).train(training)
    images = torch.rand(batch_size, 3, 224, 224)
    labels = torch.randint(0, 1000, (batch_size,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)

    def infer():
        with torch.inference_mode():
            model(images)

    def train():
        optimizer.zero_grad(set_to_none=True)
        logits = model(images)
        torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        optimizer.step()

    return train if training else infer


def ours(folder: str, *, keep_rate: float, batch_size: int, training: bool):
    """A call of our model, as the benchmark times it."""
    del folder
    import jax

    from evit_jax.measure import comparison
    from evit_jax.models import init_params
    from evit_jax.runtime.parallel import DataParallel
    from evit_jax.training.trained import spec_of_name

    one = comparison.comparisons_of(
        [spec_of_name("deit_small_patch16_224")],
        dtypes=[np.dtype("float32")],
        modes=["training" if training else "inference"],
        batch_sizes=(batch_size,),
        reducers=["evit"],
        keep_rates=(keep_rate,),
    )[0]
    variant = one.variants[-1]
    one = dataclasses.replace(one, variants=[variant])
    devices = DataParallel(jax.devices()[:1])
    params = devices.init(functools.partial(init_params, variant.model), jax.random.key(0))
    programs = comparison.compile_all(one, params, devices, lambda text: None)
    program = programs[variant.name]
    return lambda: jax.block_until_ready(program.call())


def work(side: str, folder: str) -> None:
    """A child process: reads what to time, a line each, and answers with seconds a call."""
    calls = {}
    for line in sys.stdin:
        wanted = json.loads(line)
        least, seconds = wanted.pop("least"), wanted.pop("seconds")
        key = json.dumps(wanted)
        if key not in calls:
            calls[key] = dict(reference=reference, ours=ours)[side](folder, **wanted)
            calls[key]()
        calls[key]()
        start, count = time.perf_counter(), 0
        while count < least or time.perf_counter() - start < seconds:
            calls[key]()
            count += 1
        print(json.dumps((time.perf_counter() - start) / count), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--batch_sizes", default="1,8,32")
    parser.add_argument("--keep_rates", default="1,0.7")
    parser.add_argument("--training", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        return work(flags.worker, flags.reference)

    def start(side: str, python: str) -> subprocess.Popen:
        command = [python, __file__, f"--worker={side}", f"--reference={flags.reference}"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1, text=True)
        return subprocess.Popen(command, **pipes)

    sides = dict(reference=start("reference", flags.python), ours=start("ours", sys.executable))
    cases = list(
        itertools.product(
            map(int, flags.batch_sizes.split(",")), map(float, flags.keep_rates.split(","))
        )
    )
    speeds = {(side, *case): [] for case in cases for side in sides}
    for number in range(flags.rounds + 1):  # the first one compiles and is not counted
        for batch_size, keep_rate in cases:
            wanted = dict(keep_rate=keep_rate, batch_size=batch_size, training=flags.training)
            wanted |= dict(least=2, seconds=flags.seconds) if number else dict(least=1, seconds=0)
            for side in reversed(sides) if number % 2 else sides:
                sides[side].stdin.write(json.dumps(wanted) + "\n")
                seconds = json.loads(sides[side].stdout.readline())
                if number:
                    speeds[side, batch_size, keep_rate].append(batch_size / seconds)
        print(f"round {number} of {flags.rounds}", file=sys.stderr)
    rows = []
    for case in cases:
        theirs, mine = (np.asarray(speeds[side, *case]) for side in sides)
        ratio = mine / theirs
        rows.append(dict(batch_size=case[0], keep_rate=case[1]))
        for name, values in dict(reference=theirs, ours=mine, ratio=ratio).items():
            rows[-1][name] = [float(f(values)) for f in (np.median, np.min, np.max)]
        print(rows[-1], file=sys.stderr)
    print(json.dumps(dict(training=flags.training, rounds=flags.rounds, results=rows)))


if __name__ == "__main__":
    main()
