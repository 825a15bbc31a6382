# SPDX-License-Identifier: Apache-2.0
"""What a plan costs on a chip that is not there, quickly enough to search with.

A chip's compiler takes a minute for a whole model, and a search asks for hundreds. So it prices one
block at each number of tokens that fills the chip's tiles, once, and two whole programs say what is
left: the stem and heads by the dense one, and what the method does by itself by a reduced one.
"""

from collections.abc import Callable

import numpy as np

from evit_jax.errors import InputError
from evit_jax.measure.chip_plan import TILE, prices
from evit_jax.measure.chips import Estimate, Target
from evit_jax.measure.programs import without_program_cache


class ChipCost:
    """Model -> estimated cycles (of a GPU: bytes) of a batch on a chip.

    The sum of its blocks at the tokens that they work on, rounded up to full tiles; a constant for
    what lies outside of blocks; and the reducer's own part, which is taken to grow with the tokens
    that it gets. Of the dense model it is exactly what the compiler expects.
    """

    def __init__(
        self,
        model,
        target: Target,
        batch_size: int,
        *,
        reduced=None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """Compiles what is needed.

        Args:
          model: what it keeps does not matter.
          target: the chip.
          batch_size: images in a call.
          reduced: the model with a plan near those to be priced, for the reducer's own part; None
            leaves that out.
          progress: called with the number of programs compiled, and of all.

        Raises:
          InputError: the dense model does not fit into the chip.
        """
        self.target, self.batch_size, self.dtype = target, batch_size, model.dtype
        dense = model.clone(keep=())
        most = dense.prefix + dense.patches
        tokens = range(TILE, most + TILE, TILE)
        total = len(tokens) + 1 + (reduced is not None)
        self.costs, self.outside, self.each = [], 0.0, 0.0
        with without_program_cache():
            progress(0, total)
            self.dense = self.whole(dense)
            for done, count in enumerate(tokens, 2):
                progress(done - 1, total)
                self.costs.append(target.block_cost(dense, min(count, most), batch_size))
            # More tokens are no cheaper: what the compiler finds for more could be had for fewer.
            self.costs = np.maximum.accumulate(self.costs)
            self.outside = self.dense.cost - self(dense)
            if reduced is not None:
                progress(total - 1, total)
                self.fit(reduced)
        progress(total, total)

    def fit(self, model) -> Estimate:
        """Sets the reducer's own part so that this model costs what its whole program does.

        Returns:
          what the compiler expects of that.
        """
        self.each, estimate = 0.0, self.whole(model)
        self.each = max(estimate.cost - self(model), 0.0) / sum(entering(model))
        return estimate

    def whole(self, model) -> Estimate:
        """What the compiler expects of a whole model, in the dtype of the one it began with."""
        estimate = self.target.logits(model.clone(dtype=self.dtype), self.batch_size)
        if estimate.cost is None:
            raise InputError(
                f"the model does not fit into a {self.target.name} at batch size "
                f"{self.batch_size}; try a smaller batch"
            )
        return estimate

    def price(self, tokens: int) -> float:
        """Of a block, prefix included."""
        return float(self.costs[-(-tokens // TILE) - 1])

    def __call__(self, model) -> float:
        return self.outside + sum(prices(model, self.price)) + self.each * sum(entering(model))


def entering(model) -> list[int]:
    """Tokens that enter each reducing block."""
    before = (model.prefix + model.patches, *model.tokens_per_block)
    return [tokens for tokens, entry in zip(before, model.kept, strict=False) if entry is not None]
