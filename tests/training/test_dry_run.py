# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import jax
import pytest

from evit_jax.runtime.collectives import Array, Collective
from evit_jax.training import dry_run

PARAMS = dict(kernel=jax.ShapeDtypeStruct((48, 192), "float32"))
STATE = dict(params=PARAMS, step=jax.ShapeDtypeStruct((), "int32"))
BATCH = dict(
    image=jax.ShapeDtypeStruct((16, 8, 8, 3), "uint8"), label=jax.ShapeDtypeStruct((16,), "int32")
)
LOOP = ["(a", "turn", "of", "loops)"]
DEVICES = SimpleNamespace(mesh=SimpleNamespace(size=4), platform="tpu")


def compiled(arguments, temporaries, text=""):
    """Stands in for a program: what XLA says of it."""
    analysis = SimpleNamespace(
        argument_size_in_bytes=arguments * 2**20, temp_size_in_bytes=temporaries * 2**20
    )
    return SimpleNamespace(memory_analysis=lambda: analysis, as_text=lambda: text)


@pytest.mark.parametrize(
    ("kind", "name", "shape", "what"),
    [
        ("all-reduce", "jit(train_step)/transpose(jvp(ViT))/norm", (48,), "gradients"),
        ("reduce-scatter", "", (256, 48), "gradients"),
        ("all-reduce", "jit(train_step)/reduce_sum", (), "figures"),
        ("all-gather", "state['params']['head']['kernel']", (4, 250, 48), "parameters"),
        ("all-reduce", "state['params']['head']['kernel']", (48, 1000), "parameters"),
        ("all-reduce", "jit(train_step)/transpose(jvp(ViT))/head", (16, 48), "activations"),
        ("all-reduce", "jit(train_step)/transpose(jvp(ViT))/head", (4, 48), "activations"),
        ("all-gather", "jit(train_step)/jvp(ViT)/squeeze", (16, 1, 48), "activations"),
        ("collective-permute", "jit(train_step)/jvp(ViT)/squeeze", (12, 48), "activations"),
        ("collective-permute", "jit(train_step)/transpose(jvp(ViT))/fc1", (12, 48), "gradients"),
        ("collective-permute", "jit(train_step)/transpose(jvp(ViT))/fc1", (4, 48), "activations"),
        ("collective-permute", "", (4, 48), "activations"),
        ("collective-permute", "", (12, 48), "unnamed"),
    ],
)
def test_what_is_sent_is_told_by_name_and_shape(kind, name, shape, what):
    collective = Collective(kind, (Array("f32", shape),), name)
    assert dry_run.purpose(collective, collective.arrays[0], PARAMS, BATCH, devices=4) == what


def test_a_first_axis_that_a_parameter_has_too_is_not_one_of_images():
    collective = Collective("all-reduce", (Array("f32", (48, 192)),), "")
    batch = dict(label=jax.ShapeDtypeStruct((48,), "int32"))
    assert dry_run.purpose(collective, collective.arrays[0], PARAMS, batch, devices=4) == (
        "gradients"
    )


def test_the_collectives_add_up():
    array = Array("bf16", (512, 1024))  # 1 MiB
    found = [
        Collective("all-reduce", (array, array, Array("f32", ())), "jit(train_step)/transpose"),
        Collective("all-reduce", (array,), "jit(train_step)/transpose"),
        Collective("all-gather", (array,), "state['params']['head']"),
        Collective("collective-permute", (array,), "jit(train_step)/transpose(jvp(ViT))", True),
    ]
    lines = [
        row.split() for row in dry_run.collective_table(found, STATE, BATCH, DEVICES).splitlines()
    ]
    assert lines[2:] == [
        ["all-reduce", "gradients", "bf16", "2", "3", "3.000"],
        ["all-gather", "parameters", "bf16", "1", "1", "1.000"],
        ["collective-permute", *LOOP, "gradients", "bf16", "1", "1", "1.000"],
        ["all-reduce", "figures", "f32", "1", "1", "0.000"],
        ["all", "4", "6", "5.000"],
    ]


def test_memory_is_compared_with_the_devices():
    fitting = dry_run.step_tables(STATE, BATCH, compiled(30, 70), DEVICES, memory=100 * 2**20)
    assert "memory on 4 tpu device(s)" in fitting
    assert "fits into its memory of" in fitting
    over = dry_run.step_tables(STATE, BATCH, compiled(30, 71), DEVICES, memory=100 * 2**20)
    assert "DOES NOT FIT into" in over
    assert "its memory" not in dry_run.step_tables(STATE, BATCH, compiled(30, 71), DEVICES)


def test_one_device_sends_nothing():
    alone = SimpleNamespace(mesh=SimpleNamespace(size=1), platform="tpu")
    assert "between devices" not in dry_run.step_tables(STATE, BATCH, compiled(1, 1), alone)
    assert "between devices" in dry_run.step_tables(STATE, BATCH, compiled(1, 1), DEVICES)
