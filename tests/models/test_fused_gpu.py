# SPDX-License-Identifier: Apache-2.0
"""What a program for a GPU computes in cuDNN's kernel, by the same function on a CPU."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import attention, fused_gpu

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
