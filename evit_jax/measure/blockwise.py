# SPDX-License-Identifier: Apache-2.0
"""A model of this package block by block, so that plans share what they have in common.

A plan's program takes seconds to compile; one of its blocks takes a tenth of that, and blocks with
as many tokens are one program, whatever their number. What a plan computes up to its first block
that differs from another's is not computed again either. It is the model's own code that runs: its
blocks as they are, and what it does before and after them.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamNotFoundError, ScopeParamShapeError

from evit_jax.errors import InputError
from evit_jax.models.block import Block
from evit_jax.plan.counts import Entry, Keep
from evit_jax.runtime.parallel import DataParallel
from evit_jax.tokens import Reducer, Signals, Tokens

State = tuple[Tokens, Signals]
ARRAYS = ("q", "k", "v", "row", "before", "after", "weight", "plain_q", "plain_k", "bias", "rng")


class Blockwise:
    """The parts of a model and their compiled programs."""

    def __init__(self, model, params: dict):
        """Args: a model of this package, whatever it keeps, and its parameters; on one device.

        Raises:
          InputError: a reducer that works after the last block.
        """
        if model.reducer.site == "output":
            raise InputError(
                f"{model.reducer} works after the last block, so no block gets cheaper"
            )
        self.devices = DataParallel(jax.devices()[:1])
        self.dense = model.clone(keep=(), remat=False)
        self.params = self.devices.init(dict, params)
        self.compiled: dict[str, Callable] = {}
        found: dict[tuple, Block] = {}

        def see(block: Block, args: tuple) -> None:
            found.setdefault(block.path, block.clone(parent=None, name=None))

        images = jax.ShapeDtypeStruct((1, *model.image_size, 3), jnp.float32)
        jax.eval_shape(functools.partial(self.watched, see=see), params, images)
        self.paths, self.blocks = zip(*found.items(), strict=True)

    def watched(self, params: dict, images: jax.Array, see: Callable) -> tuple[jax.Array, dict]:
        """The dense model, with every block and its arguments shown to `see` before it runs.

        What `see` returns, if anything, are the arguments instead.
        """

        def intercept(function, args, settings, context):
            if isinstance(context.module, Block) and context.method_name == "__call__":
                args = see(context.module, args) or args
            return function(*args, **settings)

        with nn.intercept_methods(intercept):
            return self.dense.apply({"params": params}, images)

    @functools.cached_property
    def start(self) -> Callable[[dict, jax.Array], tuple[State, tuple[jax.Array, jax.Array]]]:
        """(params, images (B, H, W, 3)) -> (what enters the first block, the dense answers)."""

        def program(params, images):
            entered = []
            logits, out = self.watched(params, images, lambda block, args: entered.append(args[:2]))
            tokens, signals = entered[0]
            return (tokens, signals.replace(layer=0)), (logits, self.read_by_heads(out))

        return self.devices.compile_eval(program)

    @functools.cached_property
    def finish(self) -> Callable[[dict, Tokens], tuple[jax.Array, jax.Array]]:
        """(params, tokens after the last block) -> (logits, features), as of the model."""

        def program(params, tokens):
            def intercept(function, args, settings, context):
                if isinstance(context.module, Block) and context.method_name == "__call__":
                    return tokens.replace(x=tokens.x[:, : args[3]]), Signals(class_token=False)
                return function(*args, **settings)

            images = jnp.zeros((tokens.x.shape[0], *self.dense.image_size, 3), jnp.float32)
            with nn.intercept_methods(intercept):
                logits, out = self.dense.apply({"params": params}, images)
            return logits, self.read_by_heads(out)

        return self.devices.compile_eval(program)

    def read_by_heads(self, out: dict) -> jax.Array:
        """(B, 1 or 2, D): of the model's features those that heads read, and not registers."""
        return out["features"][:, : 1 + self.dense.distilled]

    def step(self, number: int, reducer: Reducer, keep: Entry, state: State) -> State:
        """What leaves a block: its tokens, and the signals of its attention for a next block.

        Raises:
          InputError: the reducer has parameters, and those at hand are of another plan, or missing.
        """
        block = self.blocks[number].clone(reducer=reducer, keep=keep)
        params = functools.reduce(lambda tree, name: tree[name], self.paths[number], self.params)

        def block_step(params, state):
            tokens, signals = block.apply({"params": params}, *state, None, None)
            if reducer.site != "input":  # only there is the attention of the block before read
                signals = signals.replace(**dict.fromkeys(ARRAYS))
            return tokens, signals.replace(layer=0)  # programs of equal blocks are equal

        try:
            lowered = self.devices.compile_eval(block_step).lower(params, state)
        except (ScopeParamNotFoundError, ScopeParamShapeError) as error:
            raise InputError(
                f"{type(reducer).__name__} has learned for the plan that it was trained with, so "
                "other counts cannot be searched; choose a method without parameters"
            ) from error
        text = lowered.as_text()
        if text not in self.compiled:
            self.compiled[text] = lowered.compile()
        return self.compiled[text](params, state)

    def answers(
        self, reducer: Reducer, keep: Keep, entered: State, kept_states: dict | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Logits and features with a plan, from what `start` gave.

        Args:
          kept_states: plan so far -> what left its last block; looked up and added to.
        """
        states = {} if kept_states is None else kept_states
        state, first = entered, 0
        for number in range(len(keep), 0, -1):
            if (reducer, keep[:number]) in states:
                state, first = states[reducer, keep[:number]], number
                break
        for number in range(first, len(keep)):
            state = self.step(number, reducer, keep[number], state)
            states[reducer, keep[: number + 1]] = state
        return self.finish(self.params, state[0])

    def evidence(self, reducer: Reducer, images: jax.Array, key: jax.Array) -> Sequence:
        """What each block of the dense model tells the reducer of these images.

        The importance of a token is the squared gradient of the log-probability of a class drawn
        from the model's own prediction, a sample of the Fisher information; mean over draws. For a
        model without a head it is that of its features, of length 1, in a random direction.
        """
        return self.gather_evidence(reducer)(self.params, dict(images=images, key=key))

    @functools.cache  # noqa: B019  lives as long as a calibration
    def gather_evidence(self, reducer: Reducer) -> Callable:
        def program(params, batch):
            images, depth = batch["images"], len(self.blocks)

            def predict(changes):
                entered, seen = {}, {}

                def intercept(function, args, settings, context):
                    block = context.module
                    if not isinstance(block, Block) or context.method_name != "__call__":
                        return function(*args, **settings)
                    result = function(*args, **settings)
                    if args[3] is None:
                        entered[block.layer], seen[block.layer] = result
                    tokens, signals = result
                    change = changes[block.layer][:, : args[3]]
                    return tokens.replace(x=tokens.x + change), signals

                with nn.intercept_methods(intercept):
                    logits, _ = self.dense.apply({"params": params}, images)
                logits = logits.astype(jnp.float32)
                if self.dense.num_classes:
                    return jax.nn.log_softmax(logits), (entered, seen)
                length = jnp.linalg.norm(logits, axis=-1, keepdims=True)
                return logits / jnp.maximum(length, 1e-6), (entered, seen)

            length = self.dense.prefix + self.dense.patches
            shape = images.shape[0], length, self.dense.width
            zeros = [jnp.zeros(shape, self.dense.dtype)] * depth
            answers, pull, (tokens, signals) = jax.vjp(predict, zeros, has_aux=True)
            importance = [jnp.zeros(shape[:2], jnp.float32)] * depth
            for key in jax.random.split(batch["key"], DRAWS):
                if self.dense.num_classes:
                    drawn = jax.random.categorical(key, answers)
                    one = jax.nn.one_hot(drawn, answers.shape[-1], dtype=answers.dtype)
                else:
                    one = jax.random.normal(key, answers.shape, answers.dtype)
                # Of what leaves a block: nearly that of what its reducer would get.
                squares = [jnp.sum(jnp.square(g.astype(jnp.float32)), -1) for g in pull(one)[0]]
                importance = [a + b / DRAWS for a, b in zip(importance, squares, strict=True)]
            # The reducer sees tokens before the MLP.
            return [
                reducer.evidence(tokens[i].replace(x=signals[i].after), signals[i], importance[i])
                for i in range(depth)
            ]

        return self.devices.compile_eval(program)


DRAWS = 4  # classes, or directions, per image
