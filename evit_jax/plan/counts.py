# SPDX-License-Identifier: Apache-2.0
"""Token counts as plain Python ints, fixed before anything is traced.

XLA compiles one program per shape, so how many tokens each block keeps is decided here, once, and
travels as a static tuple: `keep[i]` is None where block i does not reduce, else K, the number of
patch tokens ("non-prefix tokens") that its reducer keeps, or a tuple where a method works in
several steps (DiffRate: prune to, merge to), whose last entry is what it keeps. What a reducer
appends, such as EViT's fused token, comes on top and is counted by the next block as one more patch
token.

Nothing here knows of JAX, models or methods: a reducer is two numbers, `extra` (tokens it appends)
and `smallest` (the fewest it can keep of n), and whether all patches return before the last block,
whose entry is then their number.
"""

import math
from collections.abc import Callable, Sequence

from evit_jax.errors import InputError

Entry = int | tuple[int, ...] | None  # of one block
Keep = tuple[Entry, ...]
# The fields of config.model that set the plan.
PLAN_FIELDS = ("keep_rate", "layers", "keep_rates", "tokens", "macs", "multiple_of")


def quarter_layers(depth: int) -> tuple[int, ...]:
    """The paper's reducing blocks: 3, 6, 9 of 12 (DeiT); 4, 8, 12 of 16 (LV-ViT-S)."""
    return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))


def check_rate(rate: float) -> float:
    """Returns a keep rate as a float; raises InputError unless it is in (0, 1]."""
    if isinstance(rate, bool) or not isinstance(rate, (int, float)):
        raise InputError(f"keep_rate must be a number in (0, 1], got {rate!r}")
    if not 0 < rate <= 1:  # also refuses nan
        hint = ""
        if 1 < rate <= 100:
            hint = f"; did you mean {rate / 100:g}?"
        elif rate == 0:
            hint = "; a block has to keep something, and 1 keeps everything"
        raise InputError(f"keep_rate must be in (0, 1], got {rate:g}{hint}")
    return float(rate)


def check_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """Returns the reducing blocks, 0-based; raises InputError if one is out of range or doubled."""
    layers = (layers,) if isinstance(layers, (int, float)) else tuple(layers)
    wrong = [layer for layer in layers if type(layer) is not int or not 0 <= layer < depth]
    if wrong:
        raise InputError(
            f"layers are block numbers from 0 to {depth - 1} for a model of depth {depth}, "
            f"got {', '.join(map(str, wrong))}"
        )
    if len(set(layers)) < len(layers):
        raise InputError(f"layers must not repeat a block, got {layers}")
    return tuple(sorted(layers))


def block_rates(
    depth: int,
    *,
    keep_rate: float | None = None,
    layers: Sequence[int] | None = None,
    keep_rates: Sequence[float] | None = None,
) -> tuple[float, ...]:
    """One keep rate per block, from one rate at `layers` or from `keep_rates` as they are.

    Without any argument every block keeps everything.
    """
    if keep_rates is not None:
        if keep_rate is not None or layers is not None:
            raise InputError(
                "give keep_rates (one per block), or keep_rate with layers, not both; "
                "--config=FILE.py:keep_rate=None unsets a configuration's"
            )
        if not isinstance(keep_rates, Sequence):
            raise InputError(
                f"keep_rates needs one rate per block, {depth} of them, got one number"
            )
        if len(keep_rates) != depth:
            raise InputError(
                f"keep_rates needs one rate per block: {depth} of them, got {len(keep_rates)}"
            )
        return tuple(check_rate(rate) for rate in keep_rates)
    rate = check_rate(1 if keep_rate is None else keep_rate)
    layers = check_layers(quarter_layers(depth) if layers is None else layers, depth)
    return tuple(rate if block in layers else 1.0 for block in range(depth))


def block_tokens(
    depth: int, tokens: int | Sequence[Entry], layers: Sequence[int] | None = None
) -> Keep:
    """Absolute counts for every block, from one count, one per reducing layer or one per block.

    A count may be a tuple that does not rise, for methods that work in several steps.
    """
    layers = check_layers(quarter_layers(depth) if layers is None else layers, depth)
    counts = [tokens] if isinstance(tokens, (int, float)) else list(tokens)
    counts = [tuple(count) if isinstance(count, list) else count for count in counts]
    counts = counts * len(layers) if len(counts) == 1 else counts
    if len(counts) == len(layers) < depth:
        at = dict(zip(layers, counts, strict=True))
        counts = [at.get(block) for block in range(depth)]
    if len(counts) != depth:
        raise InputError(
            f"tokens needs one count for each of the layers {layers} or for each of the {depth} "
            f"blocks (None where a block keeps all), got {len(counts)}"
        )
    for count in counts:
        steps = count if isinstance(count, tuple) else (count,)
        whole = all(type(step) is int and step >= 1 for step in steps) and steps
        if count is not None and not (whole and steps == tuple(sorted(steps, reverse=True))):
            raise InputError(
                f"tokens must be whole numbers from 1 up, or tuples of them that do not rise, "
                f"got {count!r}"
            )
    return tuple(counts)


def kept_count(entry: Entry) -> int | None:
    """What a block is left with, before what its reducer appends; None where it does not reduce."""
    return entry[-1] if isinstance(entry, tuple) else entry


def each_step(entry: Entry, function: Callable[[int], int]) -> Entry:
    """The entry with a function applied to its count, or to each of its counts."""
    return tuple(map(function, entry)) if isinstance(entry, tuple) else function(entry)


def token_plan(
    patches: int,
    depth: int,
    *,
    keep_rate: float | None = None,
    layers: Sequence[int] | None = None,
    keep_rates: Sequence[float] | None = None,
    tokens: int | Sequence[Entry] | None = None,
    multiple_of: int = 1,
    prefix: int = 1,
    extra: int = 0,
    smallest: Callable[[int], int] = lambda n: 1,
    returns: bool = False,
    remaining: float = 0.0,
) -> Keep:
    """What each block keeps: None, or K patch tokens out of the n present there.

    K = ceil(rate * n), where n counts an earlier fused token like any other (EViT, evit.py:208).
    The product is taken in Python floats. K == n means the block does not reduce (None).

    Args:
      patches: patch tokens entering block 0.
      depth: number of blocks.
      keep_rate: one rate in (0, 1] for all `layers`.
      layers: reducing blocks, 0-based; default `quarter_layers(depth)`.
      keep_rates: one rate per block, instead of `keep_rate` and `layers`.
      tokens: absolute counts instead of rates, see `block_tokens`.
      multiple_of: of what the tokens after each reducing block are a multiple, see `round_up`.
      prefix: tokens in front of the patches, which count for `multiple_of`.
      extra: tokens the reducer appends where it reduces.
      smallest: n -> the fewest patch tokens the reducer can keep of n.
      returns: whether what the reducer removed is back in the last block.
      remaining: how much of the way from keeping everything to the above remains, in [0, 1]: 1 is
        dense, 0 the target; the warm-up of the keep rate goes from 1 to 0.

    Raises:
      InputError: a rate, layer or count out of range.
    """
    if tokens is not None:
        if keep_rate is not None or keep_rates is not None:
            raise InputError(
                "give tokens (absolute counts) or keep rates, not both; "
                "--config=FILE.py:keep_rate=None unsets a configuration's"
            )
        wanted = block_tokens(depth, tokens, layers)
        if returns and wanted[-1] == patches:  # of a plan that was made here before
            wanted = (*wanted[:-1], None)
        rates = (1.0,) * depth
    else:
        wanted = (None,) * depth
        rates = block_rates(depth, keep_rate=keep_rate, layers=layers, keep_rates=keep_rates)
    keep, n = [], patches
    for block, (count, rate) in enumerate(zip(wanted, rates, strict=True)):
        if count is None:
            rate = min(1.0, rate + (1 - rate) * remaining)
            count = max(math.ceil(rate * n), smallest(n))
        elif remaining:  # on the way to counts that were checked without
            count = each_step(count, lambda k, n=n: k + math.ceil((n - k) * remaining))
            count = each_step(count, lambda k, n=n: min(max(k, smallest(n)), n))
        last, most = kept_count(count), count[0] if isinstance(count, tuple) else count
        if not smallest(n) <= last <= most <= n:
            raise InputError(
                f"block {block} has {n} patch tokens and can keep {smallest(n)} to {n} of them, "
                f"got tokens={count}"
            )
        keep.append(count if last < n else None)
        n = last + extra if last < n else n
    fixed = dict(prefix=prefix, extra=extra, smallest=smallest)
    keep = round_up(tuple(keep), patches, multiple_of=multiple_of, **fixed)
    if not returns or not any(keep):
        return keep
    if keep[-1] is not None:
        raise InputError(
            f"all patches return before the last block, {depth - 1}, which so cannot reduce; leave "
            "it out of the layers"
        )
    return (*keep[:-1], patches)


def round_up(
    keep: Keep,
    patches: int,
    *,
    multiple_of: int,
    prefix: int = 1,
    extra: int = 0,
    smallest: Callable[[int], int] = lambda n: 1,
) -> Keep:
    """The plan with more tokens, so that a device's tiles are full.

    After a reducing block there are as many tokens as the plan has there, prefix and appended ones
    included, rounded up to a multiple. The roundings of several blocks do not add up. A block
    that would so have all its tokens, or more, does not reduce.
    """
    if type(multiple_of) is not int or multiple_of < 1:
        raise InputError(
            f"multiple_of must be a whole number from 1 up (1 rounds nothing), got {multiple_of!r}"
        )
    if multiple_of == 1:
        return keep
    rounded, n = [], patches
    for entry in keep:
        if entry is not None:
            total = prefix + max(kept_count(entry), smallest(n)) + extra
            total = math.ceil(total / multiple_of) * multiple_of
            count = total - prefix - extra
            # A method's earlier steps keep no fewer than its last one.
            entry = each_step(entry, lambda k, count=count, n=n: min(max(k, count), n))
            if isinstance(entry, tuple):
                entry = (*entry[:-1], count)
            entry = entry if total < prefix + n else None
            n = n if entry is None else total - prefix
        rounded.append(entry)
    return tuple(rounded)


def rate_within(macs: float, cost: Callable[[float], int]) -> float:
    """The largest keep rate whose plan costs at most so much; 1 where the dense model does.

    Plans, and what they cost, are step functions of the rate that never fall. Halving goes on until
    no floating-point number is left between a rate that fits and one that does not, so no plan
    along the rate is missed.

    Args:
      macs: the budget, multiply-accumulates of one image.
      cost: keep rate -> those of its plan.

    Raises:
      InputError: a budget that is no number, or less than any plan costs.
    """
    if isinstance(macs, bool) or not isinstance(macs, (int, float)) or not macs > 0:
        raise InputError(
            f"macs must be a number of multiply-accumulates per image, such as 3.0e9, got {macs!r}"
        )
    fits, exceeds = math.ulp(0.0), 1.0
    if cost(exceeds) <= macs:
        return exceeds
    if (least := cost(fits)) > macs:
        raise InputError(
            f"no plan with these layers costs at most {macs:g} multiply-accumulates per image; "
            f"the fewest possible are macs={least}"
        )
    while fits < (middle := (fits + exceeds) / 2) < exceeds:
        fits, exceeds = (middle, exceeds) if cost(middle) <= macs else (fits, middle)
    return fits


def token_counts(keep: Keep, patches: int, *, prefix: int = 1, extra: int = 0) -> tuple[int, ...]:
    """Tokens after each block, prefix tokens included: 197 or 140, 100, 72 for EViT 0.7 at 224."""
    counts, n = [], patches
    for entry in keep:
        n = n if entry is None else kept_count(entry) + extra
        counts.append(prefix + n)
    return tuple(counts)
