# SPDX-License-Identifier: Apache-2.0
"""What a program for a GPU computes in cuDNN's kernel, by the same function on a CPU."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import attention, fused_gpu
from evit_jax.runtime.forms import EXACT

BATCH, LENGTH, HEADS, WIDTH = 2, 13, 3, 16


def inputs(dtype=jnp.float32, queries=LENGTH, length=LENGTH):
    rng = np.random.default_rng(queries)
    sides = (BATCH, length, HEADS, WIDTH)
    q, k, v = (jnp.asarray(rng.normal(size=sides), dtype) for _ in range(3))
    return q[:, :queries], k, v


def takes(dtype):
    """Whether attention over these inputs is the kernel's, asked afresh."""
    fused_gpu.cudnn_takes.cache_clear()
    answer = fused_gpu.has_cudnn(jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS * WIDTH), dtype), HEADS)
    fused_gpu.cudnn_takes.cache_clear()
    return answer


def plain(q, k, v):
    """The attention of attention.py, whose heads are before tokens."""
    q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
    return attention.attend(q, k, v).swapaxes(1, 2)


@pytest.mark.parametrize("queries", [1, 4, LENGTH])
def test_the_kernels_function_is_our_attention_and_has_its_gradient(queries):
    def loss(attend):
        return lambda *args: jnp.sum(jnp.sin(attend(*args)))

    args = inputs(queries=queries)

    def ours(*args):
        return fused_gpu.attend(*args, implementation="xla")

    np.testing.assert_allclose(ours(*args), plain(*args), rtol=1e-5, atol=1e-5)
    got, exact = (jax.grad(loss(attend), (0, 1, 2))(*args) for attend in (ours, plain))
    for a, b in zip(got, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, LENGTH])
def test_weights_are_features_of_the_keys(queries):
    def loss(attend):
        return lambda *args: jnp.sum(jnp.sin(attend(*args)))

    weight = jnp.asarray(np.random.default_rng(5).integers(1, 60, (BATCH, LENGTH)), jnp.float32)
    args = *inputs(queries=queries), weight

    def ours(*args):
        return fused_gpu.attend(*args, implementation="xla")

    def weighted(q, k, v, weight):
        q, k, v = (part.swapaxes(1, 2) for part in (q, k, v))
        return attention.attend_weighted(q, k, v, weight).swapaxes(1, 2)

    np.testing.assert_allclose(ours(*args), weighted(*args), rtol=1e-5, atol=1e-5)
    got, exact = (jax.grad(loss(attend), (0, 1, 2))(*args) for attend in (ours, weighted))
    for a, b in zip(got, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_weights_lose_nothing_to_half_precision():
    # All logits equal: what each value gets is its weight's share alone.
    weight = jnp.asarray([[1, 2, 3, 5, 7, 11, 49, 97]], jnp.float32)
    shares = np.asarray(weight[0] / weight.sum())
    q = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    k = jnp.zeros((1, 8, 1, 8), jnp.bfloat16)
    q, k = (jnp.pad(part, ((0, 0),) * 3 + ((0, fused_gpu.EXTRA),)) for part in (q, k))
    q, k = fused_gpu.weighted(q, k, weight)
    logits = np.einsum("bqhc,bkhc->k", np.asarray(q, np.float32), np.asarray(k, np.float32))
    got = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(got, shares, rtol=2e-4)  # 16 bits of a logarithm of up to 4.6


@pytest.mark.parametrize("weighted", [False, True])
def test_the_branch_by_the_kernel_is_the_branch_without(monkeypatch, weighted):
    rng = np.random.default_rng(0)
    sides = (3, 7, 8), (8, 24), (8, 8), (24,), (8,)
    x, *layers = (jnp.asarray(rng.normal(size=side), jnp.float32) for side in sides)
    weight = jnp.asarray(rng.integers(1, 9, (3, 7)), jnp.float32) if weighted else None
    args = x, tuple(layers[:2]), tuple(layers[2:]), weight
    about = dict(num_heads=2, first=None, at_least_one=True)
    expected, parts = attention.attention_branch(*args, **about)

    xla = fused_gpu.kernel
    monkeypatch.setattr(fused_gpu, "has_cudnn", lambda *_, **__: True)
    monkeypatch.setattr(fused_gpu, "kernel", lambda q, k, v, _: xla(q, k, v, "xla"))
    form = dataclasses.replace(EXACT, cudnn=True)
    got, theirs = attention.attention_branch(*args, **about, form=form)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    for name in ("q", "k", "v", "row"):
        np.testing.assert_allclose(theirs[name], parts[name], rtol=1e-5, atol=1e-5)


def test_the_kernel_takes_weights_that_are_never_below_one(monkeypatch):
    asked = []
    monkeypatch.setattr(
        fused_gpu, "has_cudnn", lambda x, heads, weighted=False: asked.append(weighted) or True
    )
    x, weight = jnp.zeros((2, 5, 8)), jnp.ones((2, 5))
    assert attention.kernel_takes(x, None, 2, False)
    assert attention.kernel_takes(x, weight, 2, True)
    assert asked == [False, True]
    assert not attention.kernel_takes(x, weight, 2, False)


def test_single_precision_has_no_kernel():
    assert not takes(jnp.float32)


def test_a_process_without_cudnn_says_so_and_goes_on(monkeypatch):
    def missing(*args, **options):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    assert not takes(jnp.bfloat16)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], True),
        (["9.0"], True),
        (["8.0", "8.6"], True),
        (["7.5"], False),
        (["9.0", "7.0"], False),
    ],
)
def test_gpus_older_than_the_kernel_do_without(monkeypatch, found, expected):
    gpus = [types.SimpleNamespace(compute_capability=one) for one in found]
    plainly = jax.nn.dot_product_attention

    def there(*args, implementation, **options):
        assert implementation == "cudnn"
        return plainly(*args, **options)

    def devices(backend):
        if not gpus:
            raise RuntimeError("Unknown backend")
        return gpus

    monkeypatch.setattr(jax.nn, "dot_product_attention", there)
    monkeypatch.setattr(jax, "local_devices", devices)
    assert takes(jnp.bfloat16) == expected
