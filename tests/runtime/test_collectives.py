# SPDX-License-Identifier: Apache-2.0
"""What programs send between devices: the reader of their text, and the training step's."""

import functools
import math

import jax
import pytest

from evit_jax.models import build_model, init_params
from evit_jax.models.card import Preprocessing
from evit_jax.runtime.collectives import Array, collectives
from evit_jax.runtime.parallel import DataParallel
from evit_jax.runtime.topologies import absent_devices
from evit_jax.training import optim, steps
from evit_jax.training.mix import Mix

# Lines that XLA wrote, shortened: a TPU's, but for the last two.
TPU = """HloModule jit_train_step, is_scheduled=true
%fused_computation.2 (param_0.8: bf16[48,48]) -> bf16[48,192] {
  %all-gather.1 = bf16[48,192]{0,1:T(8,128)(2,1)S(1)} all-gather(%param_0.8), channel_id=5, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={1}, metadata={op_name="state[\\'params\\'][\\'fc1\\']"}
}
%async_collective_fusion.9 (param_0.9: bf16[48,48]) -> bf16[48,192] {
  %all-gather.2 = bf16[48,192]{0,1:T(8,128)(2,1)S(1)} all-gather(%param_0.9), channel_id=5, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={1}, metadata={op_name="state[\\'params\\'][\\'fc1\\']"}
}
%all-reduce-scatter.4 (input_0: bf16[192,48]) -> (bf16[64,48]) {
  %all-reduce.9 = (bf16[256,48]{1,0:T(8,128)(2,1)}, bf16[256,48]{1,0}) all-reduce(%pad.1, %pad.2), channel_id=1, replica_groups=mesh['axis_0'=4] {'axis_0'}, to_apply=%add
}
%windowed_dot_general_body_rs.1 (wide.param: (bf16[24,384])) -> (bf16[24,384]) {
  %collective-permute.5 = bf16[24,384]{1,0} collective-permute(%g), channel_id=61, source_target_pairs={{0,1},{1,0}}
}
ENTRY %main.207_spmd (param.1: s32[]) -> (s32[]) {
  %all-reduce.8 = (f32[48]{0:T(128)S(1)}, f32[]{:T(128)}, /*index=2*/f32[48,1000]{1,0:T(8,128)}) all-reduce(%a, %b, %c), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add, metadata={op_name="jit(train_step)/transpose(jvp(ViT))/norm/reduce_sum"}
  %while.1 = (bf16[24,384]{1,0}) while(%tuple.1), condition=%windowed_dot_general_cond_rs.1, body=%windowed_dot_general_body_rs.1, metadata={op_name="x"}
  %get-tuple-element.1 = f32[48]{0:T(128)S(1)} get-tuple-element(%all-reduce.8), index=0
  %all-gather.3 = s32[4,36,48]{2,1,0:T(8,128)} all-gather(%d), channel_id=1, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}
  %collective-permute-start.1 = (bf16[4,48]{1,0}, bf16[4,48]{1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%e), channel_id=7, source_target_pairs={{0,1},{1,2}}
  %collective-permute-done.1 = bf16[4,48]{1,0} collective-permute-done(%collective-permute-start.1)
  %reduce-scatter.1 = f32[6,48]{1,0} reduce-scatter(%f), channel_id=8, replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add
  %reduce-scatter.2 = f32[6,48]{1,0} reduce-scatter(%f), channel_id=9, replica_groups={{0,1},{2,3}}, dimensions={1}, to_apply=%add
}
"""  # noqa: E501


def test_every_collective_is_read_once_with_whole_arrays():
    found = collectives(TPU)
    assert [(c.kind, [(a.dtype, a.shape) for a in c.arrays]) for c in found] == [
        ("all-gather", [("bf16", (48, 192))]),  # written twice, on one channel
        ("reduce-scatter", [("bf16", (256, 48))] * 2),
        ("collective-permute", [("bf16", (24, 384))]),
        ("all-reduce", [("f32", (48,)), ("f32", ()), ("f32", (48, 1000))]),
        ("all-gather", [("s32", (4, 36, 48))]),
        ("collective-permute", [("bf16", (4, 48))]),
        ("reduce-scatter", [("f32", (24, 48))]),
        ("reduce-scatter", [("f32", (6, 96))]),
    ]
    assert found[0].name == "state['params']['fc1']"
    assert [c.in_loop for c in found] == [False, False, True, *[False] * 5]
    assert found[3].name == "jit(train_step)/transpose(jvp(ViT))/norm/reduce_sum"
    assert found[4].name == ""


def test_bytes_are_those_of_the_dtype():
    assert Array("bf16", (48, 1000)).bytes == 96_000
    assert Array("f32", ()).bytes == 4
    assert Array("pred", (8,)).bytes == 8
    assert Array("s4", (8,)).bytes == 4


def test_a_program_of_one_device_has_none():
    compiled = jax.jit(lambda x: x.sum()).lower(jax.ShapeDtypeStruct((8,), "float32")).compile()
    assert collectives(compiled.as_text()) == []


# 14 images on each of 4 chips: an axis with a factor of 7 is one of images; no parameter has one.
IMAGES = 56
MODEL = build_model(
    "vit", image_size=32, patch_size=8, width=64, depth=3, num_heads=2, num_classes=1000,
    keep_rate=0.7, drop_path_rate=0.1, dtype="bfloat16",
)  # fmt: skip
OPTIMIZER, _ = optim.create(
    lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_steps=5, total_steps=50, weight_decay=0.05,
    clip_norm=1.0, b1=0.9, b2=0.999,
)  # fmt: skip
RECIPE = steps.Recipe(
    preprocessing=Preprocessing(),
    optimizer=OPTIMIZER,
    mix=Mix(erasing=0.25, mixup=0.8, cutmix=1.0),
    label_smoothing=0.1,
    ema_decay=0.9999,
)


@functools.cache
def four_chips(shard_params=False):
    """A slice to compile for, where its compiler is installed."""
    pytest.importorskip("libtpu")
    return DataParallel(absent_devices("v5e:2x2"), shard_params=shard_params)


@functools.cache
def state_shapes():
    def init(key):
        return steps.init_state(init_params(MODEL, key), OPTIMIZER, ema=True)

    return jax.eval_shape(init, jax.random.key(0))


def step_collectives(devices):
    """Of the whole recipe's training step."""
    step = functools.partial(steps.train_step, models=(MODEL,), recipe=RECIPE)
    batch = steps.batch_shapes(MODEL.image_size, IMAGES)
    program = devices.compile_train(step, state_shapes(), batch, {})
    return collectives(program.as_text())


def arrays_of(found, *kinds):
    return [array for c in found if c.kind in kinds for array in c.arrays]


def assert_no_images(found):
    assert found
    assert [c for c in found for a in c.arrays if any(side % 7 == 0 for side in a.shape)] == []


def numbers(arrays):
    return sum(math.prod(array.shape) for array in arrays)


def test_a_step_sums_gradients_and_figures_and_moves_nothing_else():
    found = step_collectives(four_chips())
    assert_no_images(found)
    assert {c.kind for c in found} == {"all-reduce"}
    summed = arrays_of(found, "all-reduce")
    params = sum(leaf.size for leaf in jax.tree.leaves(state_shapes()["params"]))
    # The class token's scores give q and k gradients of their own, which may be summed apart.
    assert params <= numbers(a for a in summed if a.shape) < 1.25 * params
    figures = [a for a in summed if not a.shape]
    assert 0 < len(figures) < 10  # loss and metrics


def test_a_step_with_a_sharded_state_gathers_parameters_and_no_activations():
    devices = four_chips(shard_params=True)
    found = step_collectives(devices)
    assert_no_images(found)
    # A reduce-scatter of rows that do not fill tiles ends in a move to the neighbor.
    moved = {c.kind for c in found} - {"all-gather", "all-reduce", "reduce-scatter"}
    assert moved <= {"collective-permute"}
    params = jax.tree.leaves(state_shapes()["params"])
    parts = [a for a in params if not devices.sharding(a.shape).is_fully_replicated]
    gathered = arrays_of(found, "all-gather")
    assert all(c.name.startswith("state['params']") for c in found if c.kind == "all-gather")
    assert len(parts) == MODEL.depth * 4 + 2  # of a block; patches and head
    assert numbers(gathered) == sum(a.size for a in parts)
    summed = arrays_of(found, "all-reduce", "reduce-scatter")
    assert numbers(a for a in summed if a.shape) >= sum(a.size for a in params)


def test_evaluation_with_sharded_weights_gathers_them_too():
    devices = four_chips(shard_params=True)
    params = devices.placed(state_shapes()["params"])
    batch = steps.batch_shapes(MODEL.image_size, IMAGES)
    batch["mask"] = jax.ShapeDtypeStruct((IMAGES,), bool)
    batch = jax.tree.map(lambda a: a.update(sharding=devices.split), batch)
    step = functools.partial(steps.eval_step, model=MODEL, preprocessing=Preprocessing())
    found = collectives(devices.compile_eval(step).lower(params, batch).compile().as_text())
    assert_no_images(found)
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
