# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of one image, from a model's sizes and its token plan.

The papers' "FLOPs" are these MACs: patch embedding, sum over blocks of 4 N D^2 + 2 N^2 D for
attention on the N tokens that enter and 2 N' D hidden for the MLP on the N' that leave the reducer,
and the heads. Norms, softmax, activations and the reducer's own work are not counted, as there.
"""


def block_macs(entering: int, leaving: int, width: int, hidden: int) -> int:
    """MACs of one block whose attention sees `entering` tokens and whose MLP sees `leaving`."""
    attention = 4 * entering * width**2 + 2 * entering**2 * width
    return attention + 2 * leaving * width * hidden


def macs(model) -> int:
    """MACs of one image through a backbone with the fields of `models.vit.ViT`."""
    high, wide = model.patch_size
    total = model.patches * 3 * high * wide * model.width
    entering = model.prefix + model.patches
    for leaving in model.tokens_per_block:
        total += block_macs(entering, leaving, model.width, model.hidden)
        entering = leaving
    heads = 2 if model.distilled else 1
    return total + heads * model.width * model.num_classes


def logit_macs(model) -> int:
    """MACs done where logits alone are asked for: `macs` without what the last block leaves out.

    That is the queries' attention, the projection and the MLP of all but the prefix tokens.
    """
    before = (model.prefix + model.patches, *model.tokens_per_block)[-2]
    whole = block_macs(before, model.tokens_per_block[-1], model.width, model.hidden)
    keys_and_queries = 3 * before * model.width**2
    asking = 2 * before * model.width + model.width**2 + 2 * model.width * model.hidden
    return macs(model) - whole + keys_and_queries + model.prefix * asking
