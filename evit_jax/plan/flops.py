# SPDX-License-Identifier: Apache-2.0
"""Multiply-accumulates of one image, from a model's sizes and its token plan.

The papers' "FLOPs" are these MACs: patch embedding, sum over blocks of 4 N D^2 + 2 N^2 D for
attention on the N tokens that enter and 2 N' D hidden for the MLP on the N' that leave the reducer,
and the heads. Norms, softmax and activations are not counted, as there. What a method spends on
pairs of tokens is counted (`Reducer.matching_macs`), which the papers leave out: at most 0.5 % for
ToMe, and 3 to 4 % of a DeiT-Tiny for methods that compare whole tokens.
"""


def block_macs(entering: int, leaving: int, width: int, hidden: int, *, gated: bool = False) -> int:
    """MACs of one block whose attention sees `entering` tokens and whose MLP sees `leaving`.

    Args:
      gated: whether the MLP's first layer makes two of width `hidden` (SwiGLU), not one.
    """
    attention = 4 * entering * width**2 + 2 * entering**2 * width
    return attention + (2 + gated) * leaving * width * hidden


def seen_by(site: str, entering: int, leaving: int) -> tuple[int, int]:
    """Tokens that attention and that the MLP of a block work on, by where its reducer does."""
    return {
        "between": (entering, leaving),
        "input": (leaving, leaving),
        "output": (entering, entering),
    }[site]


def macs(model) -> int:
    """MACs of one image through a model with the attributes of `models.backbone.Backbone`."""
    total, entering = model.stem_macs + model.head_macs, model.prefix + model.patches
    for keep, leaving in zip(model.kept, model.tokens_per_block, strict=True):
        tokens = seen_by(model.reducer.site, entering, leaving)
        total += block_macs(*tokens, model.width, model.hidden, gated=model.gated)
        if keep is not None:
            total += model.reducer.matching_macs(
                entering - model.prefix, keep, model.prefix, model.width, model.num_heads
            )
        entering = leaving
    return total


def logit_macs(model) -> int:
    """MACs done where logits alone are asked for: `macs` without what the last block leaves out.

    That is the queries' attention, the projection and the MLP of all but the prefix tokens; nothing
    where logits read the patches.
    """
    if model.reads_patches:
        return macs(model)
    before = (model.prefix + model.patches, *model.tokens_per_block)[-2]
    seen = seen_by(model.reducer.site, before, model.tokens_per_block[-1])
    whole = block_macs(*seen, model.width, model.hidden, gated=model.gated)
    keys_and_queries = 3 * seen[0] * model.width**2
    mlp = (2 + model.gated) * model.width * model.hidden
    asking = 2 * seen[0] * model.width + model.width**2 + mlp
    return macs(model) - whole + keys_and_queries + model.prefix * asking
