# SPDX-License-Identifier: Apache-2.0
"""A batch in chunks that a CPU's caches hold."""

import jax
import numpy as np
import pytest
from jax import export

from evit_jax.models import build_model
from evit_jax.runtime import parallel
from evit_jax.runtime.parallel import Chunked, chunk_size
from evit_jax.training import steps
from tests.models.test_vit import IMAGES, SIZES, tiny


@pytest.fixture
def one_cpu_device(monkeypatch):
    """As where a user has a CPU alone; the tests' own has four devices."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def test_a_cpu_works_on_chunks_that_its_caches_hold(one_cpu_device):
    model = build_model("deit_small_patch16_224")
    assert [chunk_size(model, n) for n in (1, 8, 16, 32, 50)] == [1, 8, 8, 8, 5]
    assert chunk_size(model, 31) == 31  # no divisor is near what fits
    assert [chunk_size(model, n, train=True) for n in (8, 16, 50)] == [4, 4, 50]
    assert chunk_size(build_model("deit_base_patch16_384"), 128, train=True) == 2
    assert chunk_size(build_model("deit_base_patch16_224"), 32) == 4
    assert steps.micro_batches(model, 16) == 4
    digits = build_model("vit", **SIZES)
    assert (chunk_size(digits, 256), steps.micro_batches(digits, 256)) == (256, 1)


def test_other_devices_work_on_whole_batches(monkeypatch):
    model = build_model("deit_small_patch16_224")
    assert chunk_size(model, 32) == 32  # several devices
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert (chunk_size(model, 32), steps.micro_batches(model, 32)) == (32, 1)


def test_a_program_for_another_chip_takes_its_batch_whole(one_cpu_device, monkeypatch):
    model = build_model("deit_small_patch16_224")
    assert (chunk_size(model, 32), chunk_size(model, 32, platform="tpu")) == (8, 32)
    assert steps.micro_batches(model, 32, platform="gpu") == 1
    monkeypatch.setattr(parallel, "CPU_CACHE", 1)
    small, params = tiny(keep_rate=0.5)

    def loops(platform):
        program = jax.jit(Chunked(small, platform).apply)
        return "while" in program.lower({"params": params}, IMAGES).as_text()

    assert (loops(None), loops("cpu"), loops("tpu")) == (True, True, False)


def test_chunks_give_what_the_whole_batch_gives(one_cpu_device, monkeypatch):
    model, params = tiny(keep_rate=0.5, distilled=True)
    whole = jax.jit(model.apply)({"params": params}, IMAGES)
    monkeypatch.setattr(
        parallel, "CPU_CACHE", 4 * 4 * (model.prefix + model.patches) * model.hidden
    )
    assert chunk_size(model, len(IMAGES)) == 4
    program = jax.jit(Chunked(model).apply).lower({"params": params}, IMAGES)
    assert "while" in program.as_text()
    chunks = program.compile()({"params": params}, IMAGES)
    assert jax.tree.structure(chunks) == jax.tree.structure(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), chunks, whole)


def test_a_model_that_is_exported_has_no_chunks(one_cpu_device, monkeypatch):
    monkeypatch.setattr(parallel, "CPU_CACHE", 1)
    model, params = tiny(keep_rate=0.5)
    images = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), 24, 24, 3), IMAGES.dtype)
    exported = export.export(jax.jit(lambda p, x: model.apply({"params": p}, x)[0]))(params, images)
    assert "while" not in exported.mlir_module()
    got = exported.call(params, IMAGES)
    np.testing.assert_allclose(got, model.apply({"params": params}, IMAGES)[0], atol=1e-5)
