# SPDX-License-Identifier: Apache-2.0
"""Costs read off the text of compiled programs."""

import pytest

from evit_jax.measure.hlo import array_bytes, label, read_costs

TPU = """HloModule jit_logits, is_scheduled=true

FileNames
1 "vit.py"

%fused_computation (param_0: bf16[8,17,64]) -> bf16[8,17,64] {
  %param_0 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %add.1 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} add(%param_0, %param_0), \
metadata={op_name="x"}, \
backend_config={"window_config":{"estimated_cycles":"999999","x":[]}}
}

%body.2 (arg.1: (s32[], bf16[8,17,64])) -> (s32[], bf16[8,17,64]) {
  %arg.1 = (s32[]{:T(128)}, bf16[8,17,64]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %next.1 = s32[]{:T(128)} add(%arg.1, %arg.1)
  ROOT %fusion.8 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} fusion(%arg.1), kind=kLoop, \
calls=%fused_computation, metadata={op_name="jit(logits)/while/body/tanh"}, \
backend_config={"window_config":{"estimated_cycles":"500","x":[]}}
}

%cheap (p.1: bf16[8,17,64]) -> bf16[8,17,64] {
  %p.1 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.1 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} copy(%p.1), \
metadata={op_name="jit(logits)/cond/copy"}, \
backend_config={"window_config":{"estimated_cycles":"3","x":[]}}
}

%dear (p.2: bf16[8,17,64]) -> bf16[8,17,64] {
  %p.2 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.2 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} copy(%p.2), \
metadata={op_name="jit(logits)/cond/copy"}, \
backend_config={"window_config":{"estimated_cycles":"30","x":[]}}
}

ENTRY %main.37 (x.1: bf16[8,17,64], p__blocks_0____attn__.1: bf16[64,64]) -> bf16[8,17,64] {
  %x.1 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[64,64]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[64,64]{1,0:T(8,128)(2,1)S(1)}, bf16[64,64]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) copy-start(%w.1)
  %copy-done = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %fusion.1 = (f32[8,17]{1,0:T(8,128)S(1)}, f32[8,17]{1,0:T(8,128)}) fusion(%x.1, \
/*index=1*/%copy-done), kind=kLoop, calls=%fused_computation, \
metadata={op_name="jit(logits)/ViT/blocks_0/attn/cond/branch_1_fun/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"1000","x":[]}}
  %fusion.2 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} fusion(%x.1), kind=kLoop, \
calls=%fused_computation, \
metadata={op_name="jit(logits)/ViT/blocks_11/attn/cond/branch_1_fun/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"2000","x":[]}}
  %sort.1 = (f32[8,16]{0,1:T(8,128)}, s32[8,16]{0,1:T(8,128)S(1)}) sort(%x.1, %x.1), \
dimensions={1}, to_apply=%cheap, metadata={op_name="jit(logits)/ViT/blocks_0/top_k"}
  %gather_fusion = bf16[72,64]{1,0:T(8,128)(2,1)S(1)} fusion(%x.1, %sort.1), kind=kCustom, \
calls=%fused_computation, metadata={op_name="jit(logits)/ViT/blocks_0/gather"}
  %kernel.1 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} custom-call(%x.1), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(logits)/ViT/blocks_0/attn/pallas_call"}
  %custom-call.2 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} custom-call(%copy-done), \
custom_call_target="ConcatBitcast"
  %while.1 = (s32[]{:T(128)}, bf16[8,17,64]{2,1,0:T(8,128)(2,1)}) while(%fusion.1), \
condition=%cond.9, body=%body.2, metadata={op_name="jit(logits)/while"}
  %cond.3 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} conditional(%x.1, %x.1, %x.1), \
branch_computations={%cheap, %dear}, metadata={op_name="jit(logits)/cond"}
  ROOT %copy.9 = bf16[8,17,64]{2,1,0:T(8,128)(2,1)} copy(%cond.3), \
backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""

GPU = """HloModule jit_step, is_scheduled=true

%fused (param_0.1: bf16[4,8]) -> bf16[4,8] {
  %param_0.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %tanh.1 = bf16[4,8]{1,0} tanh(%param_0.1)
}

%region_0.1 (arg.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %arg.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  %get-tuple-element.1 = f32[4,8]{1,0} get-tuple-element(%arg.1), index=1
  %fusion.7 = f32[4,8]{1,0} fusion(%get-tuple-element.1), kind=kLoop, calls=%fused, \
metadata={op_name="jit(step)/while/body/tanh"}
  ROOT %tuple.1 = (s32[], f32[4,8]{1,0}) tuple(%get-tuple-element.1, %fusion.7)
}

ENTRY %main.4 (x.1: bf16[4,8], w.1: bf16[8,8], y.1: f32[4,8]) -> bf16[4,8] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %w.1 = bf16[8,8]{1,0} parameter(1)
  %y.1 = f32[4,8]{1,0} parameter(2)
  %bitcast.1 = bf16[32]{0} bitcast(%x.1)
  %product = (bf16[4,8]{1,0}, s8[4194304]{0}) custom-call(%x.1, %w.1), \
custom_call_target="__cublas$lt$matmul", output_to_operand_aliasing={{0}: (1, {})}, \
metadata={op_name="jit(step)/jvp(ViT)/blocks_2/mlp/fc1/dot_general"}, backend_config={"alpha":1}
  %get-tuple-element.9 = bf16[4,8]{1,0} get-tuple-element(%product), index=0
  %fusion.2 = (f32[4]{0}, pred[4,8]{1,0}) fusion(%get-tuple-element.9, /*index=1*/%bitcast.1, \
%bitcast.1), kind=kInput, calls=%fused, metadata={op_name="jit(step)/jvp(ViT)/blocks_2/norm1/sum"}
  %while.1 = (s32[], f32[4,8]{1,0}) while(%y.1), condition=%region_1.2, body=%region_0.1, \
metadata={op_name="jit(step)/while"}, backend_config={"known_trip_count":{"n":"5"},"x":[]}
  ROOT %copy.1 = bf16[4,8]{1,0} copy(%get-tuple-element.9)
}
"""


def test_a_tpus_cycles_are_those_of_what_runs_and_blocks_add_up():
    costs = read_costs(TPU, "tpu")
    assert costs.operations == {
        "ViT/blocks/attn/dot_general": 3000,
        "while/body/tanh": 500,  # once: it does not say how often
        "cond/copy": 30,  # of the more expensive branch
        "copy": 7,
    }
    assert costs.total == 3537
    assert (costs.kernels, costs.unestimated, costs.loops) == (1, 2, 1)  # 2: sort and gather


def test_a_gpus_bytes_are_operands_and_results_without_a_librarys_workspace():
    costs = read_costs(GPU, "cuda")
    product, normalized = 64 + 128 + 64, 64 + 64 + 16 + 32  # an operand read twice counts once
    assert costs.operations == {
        "jvp(ViT)/blocks/mlp/fc1/dot_general": product,
        "jvp(ViT)/blocks/norm1/sum": normalized,
        "while/body/tanh": 5 * 2 * 128,
        "copy": 128,
    }
    assert costs.total == product + normalized + 1280 + 128
    assert (costs.kernels, costs.unestimated, costs.loops) == (3 + 5, 0, 0)


def test_bytes_of_an_array_follow_from_its_type_and_sides():
    shapes = dict(bf16="8,17,64", f32="3", pred="5", s64="", f8e4m3fn="2,2", u4="6", token="")
    assert {kind: array_bytes((kind, sides)) for kind, sides in shapes.items()} == dict(
        bf16=17408, f32=12, pred=5, s64=8, f8e4m3fn=4, u4=3, token=0
    )


def test_a_label_says_where_in_the_model_and_not_in_which_block():
    line = r'%c = copy(%p), metadata={op_name="params[\'blocks_3\'][\'attn\'][\'qkv\']"}'
    assert label(line, "copy") == "params['blocks']['attn']['qkv']"
    line = '%f = fusion(%p), metadata={op_name="jit(f)/jit(_pad)/blocks_10/pad" stack_frame_id=1}'
    assert label(line, "fusion") == "blocks/pad"
    assert label("%f = fusion(%p)", "fusion") == "fusion"


def test_text_that_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_costs("module @jit_f {\n}", "tpu")
