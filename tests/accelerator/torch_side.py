# SPDX-License-Identifier: Apache-2.0
"""The measurements of tests/accelerator that PyTorch makes, in a process of their own."""

import functools
import gc
import sys
import time
import types

import timm
import torch

from tests.accelerator.workers import answer, brief

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
prepared: dict[str, object] = {}


def describe() -> dict:
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    return dict(device=device, platform=DEVICE, torch=torch.__version__, timm=timm.__version__)


def build(sizes: dict, layers: list[int], name: str, reference: str):
    """ "timm" or "EViT 0.7", the official model with fused tokens; weights float32."""
    torch.manual_seed(0)
    family, _, rate = name.partition(" ")
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    if family == "timm":
        return timm.models.vision_transformer.VisionTransformer(**sizes, norm_layer=norm)
    sys.modules["torchprofile"] = types.SimpleNamespace(profile_macs=None)  # imported, not used
    if reference not in sys.path:
        sys.path.insert(0, reference)
    import evit

    rates = [float(rate) if block in layers else 1 for block in range(sizes["depth"])]
    return evit.EViT(**sizes, norm_layer=norm, keep_rate=rates, fuse_token=True)


def program(
    name: str,
    *,
    sizes: dict,
    layers: list[int],
    mode: str,
    batch_size: int,
    reference: str,
    backend: str,
):
    """A call of one variant; "compiled" at the end of its name is torch.compile."""
    plain, compiled, _ = name.partition(" compiled")
    model = build(sizes, layers, plain, reference).to(DEVICE).train(mode == "training")
    apply = torch.compile(model, backend=backend, dynamic=False) if compiled else model
    images = torch.randn(batch_size, 3, sizes["img_size"], sizes["img_size"], device=DEVICE)
    labels = torch.randint(0, sizes["num_classes"], (batch_size,), device=DEVICE)
    amp = functools.partial(torch.autocast, DEVICE, dtype=torch.bfloat16)

    def infer():
        with torch.inference_mode(), amp():
            return apply(images)

    if mode != "training":
        return infer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-5, weight_decay=0.05, fused=DEVICE == "cuda"
    )

    def train():
        optimizer.zero_grad(set_to_none=True)
        with amp():
            logits = apply(images)
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()

    return train


def prepare(names: list[str], limit: float, **case) -> dict:
    """Builds, compiles and calls variants; name -> its figures, or dict(error=TEXT).

    Args:
      limit: seconds, after which no further one is begun.
    """
    end = time.monotonic() + limit
    release()
    torch._dynamo.reset()
    figures = {}
    for name in names:
        start = time.perf_counter()
        if time.monotonic() > end:
            figures[name] = dict(error=f"not begun within {limit:.0f} s")
            continue
        try:
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
            call = program(name, **case)
            for _ in range(2):
                call()
            finish()
            prepared[name] = call
            figures[name] = dict(compile_seconds=time.perf_counter() - start)
            if DEVICE == "cuda":
                figures[name]["memory_bytes"] = torch.cuda.max_memory_allocated() - before
        except Exception as error:
            figures[name] = dict(error=brief(error))
            call = None
            gc.collect()
    return figures


def turn(name: str, calls: int, queued: bool) -> float:
    """Seconds a call."""
    call = prepared[name]
    finish()
    start = time.perf_counter()
    for _ in range(calls):
        call()
        if not queued:
            finish()
    finish()
    return (time.perf_counter() - start) / calls


def finish() -> None:
    """Waits until the device is idle."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def release() -> None:
    """Gives up what `prepare` made."""
    prepared.clear()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    operations = (describe, prepare, turn, release)
    answer({operation.__name__: operation for operation in operations})
