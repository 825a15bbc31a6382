# SPDX-License-Identifier: Apache-2.0
"""A TPU's attention kernel against the plain form, step by step on a CPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from evit_jax.models import attention, fused_tpu
from evit_jax.runtime.topologies import absent_devices

BATCH = 2
CASES = [(5, 2, 64), (13, 4, 64), (16, 2, 64), (9, 4, 32), (7, 1, 128)]


def inputs(length, heads, width, batch=BATCH):
    """qkv (B, N, 3 D) and weights of keys, far from uniform attention."""
    rng = np.random.default_rng(length)
    qkv = jnp.asarray(rng.normal(size=(batch, length, 3 * heads * width)), jnp.float32)
    return qkv, jnp.asarray(rng.choice([0, 0.5, 1, 3], (batch, length)), jnp.float32)


def plain(qkv, weight, heads):
    """The attention of attention.py from the same qkv."""
    batch, length, triple = qkv.shape
    width = triple // 3 // heads
    q, k, v = qkv.reshape(batch, length, 3, heads, width).transpose(2, 0, 3, 1, 4)
    q = q * width**-0.5
    args = (q, k, v) if weight is None else (q, k, v, weight)
    y = (attention.attend if weight is None else attention.attend_weighted)(*args)
    return y.swapaxes(1, 2).reshape(batch, length, -1), jnp.einsum("bhc,bhkc->bhk", q[:, :, 0], k)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_our_attention(case, weighted):
    qkv, weight = inputs(*case)
    weight = weight if weighted else None
    got = fused_tpu.attend(qkv, weight, case[1], True)
    for a, b in zip(got, plain(qkv, weight, case[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_has_our_gradient(case, weighted):
    def loss(attend):
        def of(qkv, weight):
            y, row = attend(qkv, weight if weighted else None)
            return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(row))

        return of

    args = inputs(*case)
    ours = loss(lambda *args: fused_tpu.attend(*args, case[1], True))
    got, exact = (
        jax.grad(one, (0, 1))(*args) for one in (ours, loss(lambda *args: plain(*args, case[1])))
    )
    for a, b in zip(got, exact, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_hidden_key_far_above_the_others_does_not_overflow():
    qkv, _ = inputs(6, 2, 64)
    qkv = qkv.at[:, 3, 128:256].mul(200.0)  # the key of token 3
    weight = jnp.ones((BATCH, 6)).at[:, 3].set(0.0)

    def loss(qkv, weight):
        return jnp.sum(jnp.sin(fused_tpu.attend(qkv, weight, 2, True)[0][:, :3]))

    got = fused_tpu.attend(qkv, weight, 2, True)[0]
    np.testing.assert_allclose(got, plain(qkv, weight, 2)[0], rtol=1e-5, atol=1e-5)
    assert all(jnp.isfinite(part).all() for part in jax.grad(loss, (0, 1))(qkv, weight))


def test_half_precision_stays_close():
    qkv, weight = inputs(13, 4, 64)
    got, row = fused_tpu.attend(qkv.astype(jnp.bfloat16), weight, 4, True)
    assert (got.dtype, row.dtype) == (jnp.bfloat16, jnp.float32)
    expected, _ = plain(qkv.astype(jnp.bfloat16).astype(jnp.float32), weight, 4)
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=2e-2, atol=2e-2)


def test_which_heads_it_takes():
    assert fused_tpu.supports(197, 6, 64)  # DeiT-S
    assert not fused_tpu.supports(197, 3, 64)  # DeiT-Ti: half a pair is left over
    assert not fused_tpu.supports(1025, 6, 64)  # a map too large for fast memory
    assert not fused_tpu.supports(197, 6, 48)


def test_a_mesh_splits_the_kernel_by_images():
    # XLA cannot split a kernel by itself; who knows the mesh must, as here.
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    images = PartitionSpec("data")
    split = NamedSharding(mesh, images)
    attend = jax.shard_map(
        lambda *args: fused_tpu.attend(*args, 2, True),
        mesh=mesh,
        in_specs=images,
        out_specs=images,
        check_vma=False,
    )

    def both(attend, *args):
        result, back = jax.vjp(attend, *args)
        return result, back(result)

    args = inputs(5, 2, 64, batch=8)
    program = jax.jit(functools.partial(both, attend), in_shardings=split).lower(*args).compile()
    assert "all-gather" not in program.as_text()
    expected = both(lambda *args: fused_tpu.attend(*args, 2, True), *args)
    for a, b in zip(jax.tree.leaves(program(*args)), jax.tree.leaves(expected), strict=True):
        assert a.sharding.is_equivalent_to(split, a.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_lowers_for_a_tpu_and_exports(weighted, dtype):
    qkv = jax.ShapeDtypeStruct((4, 197, 3 * 384), dtype)
    weight = jax.ShapeDtypeStruct((4, 197), jnp.float32) if weighted else None

    def both(qkv, weight):
        result, back = jax.vjp(lambda *args: fused_tpu.attend(*args, 6), qkv, weight)
        return result, back(result)

    exported = jax.export.export(jax.jit(both), platforms=["tpu"])(qkv, weight)
    assert exported.mlir_module().count("tpu_custom_call") == 2


@pytest.fixture
def compiled(monkeypatch):
    """Compiles a function of shapes and dtypes for a TPU."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests run in several processes

    def compile_for(chip, function, *shapes):
        place = SingleDeviceSharding(absent_devices(chip)[0])
        args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in shapes]
        return jax.jit(function).lower(*args).compile()

    return compile_for


SHAPES = [(72, 6, True), (100, 6, False), (140, 6, True), (197, 6, False), (197, 12, True)]


@pytest.mark.parametrize(("length", "heads", "weighted"), SHAPES)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_tpus_compiler_takes_it(compiled, chip, length, heads, weighted):
    qkv = jax.ShapeDtypeStruct((8, length, 3 * heads * 64), jnp.bfloat16)
    weight = [jax.ShapeDtypeStruct((8, length), jnp.float32)] if weighted else []

    def both(qkv, *weight):
        weight = weight[0] if weight else None
        result, back = jax.vjp(lambda *args: fused_tpu.attend(*args, heads), qkv, weight)
        return result, back(result)

    assert compiled(chip, both, qkv, *weight).as_text().count("tpu_custom_call") == 2


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_q_k_and_v_are_written_as_the_kernel_reads_them(compiled, chip):
    x = jax.ShapeDtypeStruct((128, 197, 384), jnp.bfloat16)
    kernels = [jax.ShapeDtypeStruct((384, width), jnp.bfloat16) for width in (1152, 384)]

    def branch(x, *kernels):
        return x + fused_tpu.attend(x @ kernels[0], None, 6)[0] @ kernels[1]

    text = compiled(chip, branch, x, *kernels).as_text()
    assert "tpu_custom_call" in text
    assert not re.search(r"= bf16\[128,197,1152\]\S* (copy|transpose)\(", text)
