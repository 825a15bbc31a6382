# SPDX-License-Identifier: Apache-2.0
"""docs/your_own_vit.md: its code runs, and computes what our own model computes."""

import dataclasses
import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import evit_jax
from evit_jax.errors import InputError
from evit_jax.models import build_model
from evit_jax.plan.flops import macs
from evit_jax.reducers import create_reducer
from evit_jax.tokens import Reducer, Signals, Tokens, drop, unmerge
from tests.support.reducers import Predictor

PAGE = Path(__file__).parents[1] / "docs" / "your_own_vit.md"
TEXT = PAGE.read_text()
SIZES = dict(image_size=32, patch_size=4, width=32, depth=4, num_heads=2, num_classes=10)
IMAGES = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class ReadsAll(Reducer):
    """Keeps what the product of all scores says, and asks for the rest of Signals."""

    def __call__(self, tokens, signals, keep):
        assert (signals.grid, signals.depth, signals.prefix) == ((8, 8), 4, 1)
        scores = signals.shift() * signals.received_attention() * signals.class_attention()
        scores *= jnp.mean(signals.value_norms(), axis=1)
        scores *= jnp.linalg.norm(signals.keys(), axis=-1) + signals.layer
        return drop(tokens, jax.lax.top_k(scores[:, tokens.prefix :], keep)[1])


PLANS = {  # what each is asked for
    "evit": dict(keep_rate=0.7),
    "evit:fuse=False": dict(keep_rate=0.5),
    "tome:r=8": {},
    "ward": dict(tokens=(48, 36, None, 20)),
    "random": dict(keep_rate=0.6),
    ReadsAll(): dict(keep_rate=0.6),
}


def each(*specs):
    """Parametrizes with reducers, by default with all that have a plan."""
    return pytest.mark.parametrize("spec", specs or PLANS, ids=str)


@functools.cache
def section(title):
    """The names that a section of the page defines, after its code has run from top to bottom."""
    names, start = {}, TEXT.index(f"\n## {title}\n") + 1
    end = TEXT.find("\n## ", start)
    fence = re.compile("^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for block in fence.finditer(TEXT, start, end if end > 0 else len(TEXT)):
        lines = TEXT.count("\n", 0, block.start(1))  # so that errors name the page's lines
        exec(compile("\n" * lines + block.group(1), PAGE, "exec"), names)
    return names


def ours(spec):
    """Our model with a reducer and its plan."""
    return build_model("vit", reducer=spec, **PLANS[spec], **SIZES)


@functools.cache
def our_params():
    """Parameters of it, whatever the reducer, none of which is zero or one."""
    _, params = evit_jax.create_model("vit", **SIZES)
    generator = np.random.default_rng(1)

    def drawn(path, leaf):
        middle = float(path[-1].key == "scale")
        return (middle + generator.normal(size=leaf.shape) * 0.2).astype(np.float32)

    return jax.tree_util.tree_map_with_path(drawn, params)


@functools.cache
def linen_params():
    """The same for the page's Linen model."""
    heads, found = SIZES["num_heads"], {}
    for path, leaf in flatten_dict(our_params()).items():
        if path[0] == "patch_embed" and path[1] == "kernel":
            found[path] = leaf.reshape(4, 4, 3, -1)
        elif "qkv" in path:
            for name, part in zip(("query", "key", "value"), np.split(leaf, 3, -1), strict=True):
                found[(*path[:2], name, path[3])] = part.reshape(*part.shape[:-1], heads, -1)
        elif "proj" in path:
            kernel = path[3] == "kernel"
            split = leaf.reshape(heads, -1, leaf.shape[-1]) if kernel else leaf
            found[(*path[:2], "out", path[3])] = split
        else:
            found[tuple(name for name in path if name != "mlp")] = leaf
    return unflatten_dict(found)


@functools.cache
def in_nnx():
    """The page's NNX model with the parameters of its Linen model."""
    model = section("NNX")["ViT"](rngs=nnx.Rngs(0))
    flat = flatten_dict(linen_params())
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = (f"blocks_{path[1]}", *path[2:]) if path[0] == "blocks" else path
        value = flat.pop(path)
        assert value.shape == leaf.shape
        leaf[...] = value
    assert not flat
    return model


def in_linen(spec):
    """The page's Linen model with a reducer."""
    names, reducer = section("Linen"), create_reducer(spec)
    keep = names["plan"](reducer, patches=64, depth=4, **PLANS[spec])
    return names["ReducingViT"](reducer=reducer, keep=keep)


@functools.cache
def run_linen(spec):
    return jax.jit(in_linen(spec).apply)({"params": linen_params()}, IMAGES)


def test_the_numbers_on_the_page_are_those_of_its_code():
    names = section("Linen")
    counts = [tokens.x.shape[1] for tokens in names["blocks"]]
    assert f"print(model.keep)  # {names['model'].keep}: EViT" in TEXT
    assert f"# {counts}, with class and fused token" in TEXT
    assert f"print(merging.keep)  # {names['merging'].keep}\n" in TEXT
    assert names["features"].shape == (2, 64, 32)
    assert names["pooled"].shape == (2, 32)
    for name in ("merging", "joining"):
        apply = functools.partial(names[name].apply, {"params": names["params"]})
        _, blocks = jax.eval_shape(apply, names["images"])
        assert [tokens.x.shape[1] - 1 for tokens in blocks] == list(names[name].keep)
    names = section("Pitfalls")
    share = names["macs"](names["before"], names["after"]) / names["macs"]((65,) * 4, (65,) * 4)
    assert f"# {share:.2f} of the dense model's" in TEXT
    assert f"# {names['after']}\n" in TEXT
    model = ours("evit")
    blocks = macs(model) - model.stem_macs - model.head_macs
    assert names["macs"](names["before"], names["after"]) == blocks


def test_with_everything_kept_both_are_the_plain_models():
    names, keep = section("Linen"), (None,) * 4
    variables = {"params": linen_params()}
    plain = jax.jit(names["ViT"]().apply)(variables, IMAGES)
    logits, blocks = jax.jit(names["ReducingViT"](keep=keep).apply)(variables, IMAGES)
    np.testing.assert_array_equal(logits, plain)
    assert blocks[-1].weight is None

    names, model = section("NNX"), in_nnx()
    logits, _ = names["apply"](model, IMAGES, reducer=create_reducer("evit"), keep=keep)
    np.testing.assert_array_equal(logits, nnx.jit(lambda model, x: model(x))(model, IMAGES))
    np.testing.assert_allclose(logits, plain, atol=1e-5)


@each()
def test_it_computes_what_our_model_computes(spec):
    model = ours(spec)
    assert in_linen(spec).keep == model.keep
    expected, out = jax.jit(model.apply)({"params": our_params()}, IMAGES)
    logits, blocks = run_linen(spec)
    assert tuple(tokens.x.shape[1] for tokens in blocks) == model.tokens_per_block
    assert np.std(logits) > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    for tokens, x in zip(blocks, out["blocks"], strict=True):
        np.testing.assert_allclose(tokens.x, x, atol=1e-5)
    np.testing.assert_array_equal(blocks[-1].owner, out["owner"][-1])
    np.testing.assert_array_equal(blocks[-1].size, out["size"])


@each("evit", "tome:r=8", "ward", ReadsAll())
def test_nnx_computes_what_linen_computes(spec):
    expected, linen = run_linen(spec)
    arguments = dict(reducer=create_reducer(spec), keep=in_linen(spec).keep)
    logits, blocks = section("NNX")["apply"](in_nnx(), IMAGES, **arguments)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_array_equal(blocks[-1].owner, linen[-1].owner)


@each("evit", "ward", ReadsAll())
def test_the_layer_in_the_order_of_hugging_face_computes_what_the_block_computes(spec):
    names, reducer = section("Blocks in the order of Hugging Face"), create_reducer(spec)
    block = linen_params()["blocks_1"]
    attention = {
        name: dict(kernel=layer["kernel"].reshape(32, 32), bias=layer["bias"].reshape(32))
        for name, layer in block["attn"].items()
    }
    params = dict(
        layernorm_before=block["norm1"],
        attention_output=attention.pop("out"),
        attention=attention,
        layernorm_after=block["norm2"],
        intermediate=block["fc1"],
        output=block["fc2"],
    )
    x = np.random.default_rng(2).normal(size=(3, 65, 32)).astype(np.float32)
    tokens = section("Linen")["start"](x, prefix=1)
    # As after an earlier merge.
    tokens = tokens.replace(weight=1.0 + jnp.arange(65.0)[None].repeat(3, 0) % 3)
    signals = Signals(grid=(8, 8), layer=1, depth=4)
    found, expected = (
        jax.jit(module.apply)({"params": params}, tokens, signals)
        for module, params in (
            (names["Layer"](2, 128, reducer, 30, layer_norm_eps=1e-6), params),
            (section("Linen")["ReducingBlock"](2, reducer, 30), block),
        )
    )
    assert found.x.shape[1] == 31 + reducer.extra
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


def test_it_compiles_once():
    names, model, traced = section("NNX"), in_linen("ward"), []

    def linen(params, images):
        traced.append("linen")
        return model.apply({"params": params}, images)

    def with_nnx(model, images, reducer, keep):
        traced.append("nnx")
        return names["reduced"](model, images, reducer, keep)

    linen = jax.jit(linen)
    with_nnx = nnx.jit(with_nnx, static_argnames=("reducer", "keep"))
    for _ in range(2):  # a reducer is equal to another with the same settings
        linen(linen_params(), IMAGES)
        with_nnx(in_nnx(), IMAGES, reducer=create_reducer("ward"), keep=tuple(model.keep))
    assert traced == ["linen", "nnx"]
    other = names["token_plan"](64, 4, keep_rate=0.5)
    with_nnx(in_nnx(), IMAGES, reducer=create_reducer("ward"), keep=other)
    assert traced == ["linen", "nnx", "nnx"]


@each("evit", "ward")
def test_gradients_are_finite(spec):
    apply = in_linen(spec).apply
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(apply({"params": p}, IMAGES)[0]))))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(linen_params())))


@each("tome:r=8", "ward")
def test_the_pooled_mean_is_that_of_the_dense_features(spec):
    _, blocks = run_linen(spec)
    last = blocks[-1]
    dense = unmerge(last.x, last.owner, prefix=1)
    pooled = section("Linen")["mean_of_patches"](last, last.x)
    np.testing.assert_allclose(pooled, dense.mean(axis=1), atol=1e-5)


def test_a_model_without_a_class_token_takes_methods_that_need_none():
    names, signals = section("Linen"), Signals(class_token=False, prefix=0)
    x, key = np.ones((2, 64, 32), np.float32), jax.random.key(0)
    tokens = names["start"](x, prefix=0)
    block = names["ReducingBlock"](2, create_reducer("tome"), 40)
    reduced, _ = jax.eval_shape(block.init_with_output, key, tokens, signals)
    assert reduced.x.shape == (2, 40, 32)
    block = names["ReducingBlock"](2, create_reducer("evit"), 40)
    with pytest.raises(InputError):
        jax.eval_shape(block.init_with_output, key, tokens, signals)


def test_what_is_left_out_is_said_in_the_words_of_the_page():
    names = section("Pitfalls")
    trace, page = names["trace"], " ".join(TEXT.split())
    for missing in (dict(q=None), dict(class_token=False)):
        with pytest.raises(InputError) as error:
            trace("evit", **missing)
        assert f"`{error.value}".split(" and reads")[0] in page
    with pytest.raises(ValueError, match="top_k"):
        trace("evit", keep=65)
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.eval_shape(lambda keep: trace("evit", keep=keep), jnp.int32(32))
    q = jnp.ones((2, 2, 65, 16))
    for method, given in (
        (Signals.class_attention, dict(q=q)),
        (Signals.attention, dict(q=q)),
        (Signals.keys, dict(q=q)),
        (Signals.value_norms, dict(q=q, k=q)),
        (Signals.shift, dict(q=q, k=q, v=q)),
    ):
        with pytest.raises((TypeError, ValueError, AttributeError), match="None"):
            method(Signals(**given))


def test_the_table_has_every_field_of_signals():
    table = TEXT[TEXT.index("| field | pass |") : TEXT.index("`Tokens` needs")]
    first = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("|"))
    fields = set(Signals.__dataclass_fields__) - {"plain_q"}  # no score is made of it
    assert set(re.findall("`([a-z_]+)`", first)) == fields
    sentences = TEXT[TEXT.index("`Tokens` needs") :]
    assert all(f"`{name}`" in sentences for name in set(Tokens.__dataclass_fields__) - {"aux"})


def test_attention_dropout_and_masks_still_reach_attention():
    dropped = dict(dropout_rate=0.5, deterministic=False)
    attention = nn.MultiHeadDotProductAttention(2, **dropped)

    @functools.wraps(nn.dot_product_attention)
    def attention_fn(q, k, v, **settings):
        return nn.dot_product_attention(q, k, v, **settings)

    rngs, x = dict(params=jax.random.key(0), dropout=jax.random.key(1)), IMAGES.reshape(3, 96, 32)
    mask = jnp.tril(jnp.ones((96, 96), bool))[None, None]
    variables = jax.jit(attention.init)(rngs, x)
    found, expected = (
        jax.jit(module.apply)(variables, x, mask=mask, rngs=rngs)
        for module in (attention.clone(attention_fn=attention_fn), attention)
    )
    np.testing.assert_array_equal(found, expected)


def test_a_method_with_parameters_runs_in_nnx():
    names = section("NNX")
    tokens, signals = names["blocks"][0], Signals()
    predictor = nnx.bridge.ToNNX(Predictor(), rngs=nnx.Rngs(0))
    predictor.lazy_init(tokens, signals, 20)
    assert nnx.state(predictor, nnx.Param)
    assert predictor(tokens, signals, 20).x.shape[1] == 21
