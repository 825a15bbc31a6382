# SPDX-License-Identifier: Apache-2.0
"""How an array lies in memory, where a compiler should not choose by itself.

`jax.experimental.layout.with_layout_constraint` as an operation of our own, for one reason:
`jax.export` refuses programs with that constraint. Here an exported program goes without.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

TOKENS_OUTSIDE = Layout((1, 0, 2))


def tokens_outside(x: jax.Array) -> jax.Array:
    """x (B, N, D) with all images of a token side by side in memory.

    So a TPU's compiler has it where a batch of 128 comes in, since few token counts are multiples
    of a tile; where all of a block is laid out so, no copies stand between its products.
    """
    return operation.bind(x)


operation = Primitive("tokens_outside")
operation.def_impl(lambda x: x)
operation.def_abstract_eval(lambda x: x)
ad.deflinear2(operation, lambda cotangent, _: [tokens_outside(cotangent)])
# Under vmap there is one axis more, and nothing that a compiler should be told.
batching.primitive_batchers[operation] = lambda args, axes: (args[0], axes[0])


def lower(context, x):
    if getattr(context.module_context.lowering_parameters, "for_export", False):
        return [x]
    constrained = mlir.lower_fun(
        lambda x: with_layout_constraint(x, TOKENS_OUTSIDE), multiple_results=False
    )
    return constrained(context, x)


mlir.register_lowering(operation, lower)
