# SPDX-License-Identifier: Apache-2.0
"""Top-K: keep the patches that score highest and drop the rest.

The plainest pruning, as in Haurum et al., "Which Tokens to Use?" (ICCV 2023 workshops), where it is
EViT without the fused token.
"""

import dataclasses

from evit_jax.plan.counts import Entry
from evit_jax.reducers._scores import Ranks, best, importance
from evit_jax.tokens import Signals, Tokens, drop


@dataclasses.dataclass(frozen=True)
class TopK(Ranks):
    """Keeps the K patch tokens with the highest score, in descending order of it.

    Ties go to the lower index. With a_hj the class token's attention to token j in head h, k_hj and
    v_hj that token's keys and values, `by` is one of
      "class"        mean over heads of a_hj, as in EViT
      "class_value"  mean over heads of a_hj ||v_hj||
      "received"     attention received, mean over heads and all queries
      "mean"         attention of the mean query, see `Signals.mean_attention`
      "probe"        attention of the pooling probe, see `Signals.probe_attention`
      "shift"        ||after - before|| of attention, as in the reducer shift
      "key_norm"     ||k_j||, all heads as one vector
      "value"        ||v_j||, all heads as one vector
    The two with a_hj need a class token, "probe" needs map pooling; only "received" needs the whole
    attention map.
    """

    by: str = "class"

    def __call__(self, tokens: Tokens, signals: Signals, keep: Entry) -> Tokens:
        return drop(tokens, best(importance(self.by, tokens, signals), tokens, keep))


REDUCER = TopK
