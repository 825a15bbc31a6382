# SPDX-License-Identifier: Apache-2.0
"""ONNX by jax2onnx: the whole model as one file for onnxruntime.

ONNX has no choice by platform, so every part has the CPU's form (runtime/forms.py): a gather, one
product for queries, keys and values, the exact GELU.
"""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from evit_jax.errors import InputError
from evit_jax.export.quantize import MOST, quantize
from evit_jax.export.rewrite import rewritten, run
from evit_jax.runtime.forms import EXACT, only_form
from evit_jax.storage import read, write_whole

INPUT, OUTPUT = "images", "logits"


def check_installed() -> None:
    """Raises InputError where jax2onnx or onnxruntime is missing."""
    for name in ("onnx", "onnxruntime", "jax2onnx"):
        if not importlib.util.find_spec(name):
            raise InputError(
                f'onnx needs {name}: pip install "evit_jax[onnx]", and then '
                'pip install --no-deps "jax2onnx>=0.17.1", which asks for an older Orbax'
            )


def write(
    path: Path,
    function: Callable[[jax.Array], jax.Array],
    image_size: tuple[int, int],
    *,
    batch: int | None = None,
) -> None:
    """Writes images (B, height, width, 3) float32 -> an array, with its constants, to a file.

    Args:
      batch: B; None: any.

    Raises:
      InputError: the extra "onnx" is missing, or jax2onnx has no ONNX for an operation.
    """
    check_installed()
    from jax2onnx import to_onnx

    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # hundreds of lines on unknown shapes
    count = batch or export.symbolic_shape("batch")[0]
    shape = jax.ShapeDtypeStruct((count, *image_size, 3), jnp.float32)
    # While jax2onnx traces, many functions of jax.numpy are its own, some of which take no batch of
    # any size. So the function is traced before, and run as the list of operations that it is.
    with only_form(EXACT):
        traced = jax.make_jaxpr(rewritten(function, RULES))(shape)
    try:
        model = to_onnx(
            lambda images: run(traced.jaxpr, traced.consts, [images], {}, lambda x: x, fold=True)[
                0
            ],
            [shape],
            model_name="evit_jax",
            input_names=[INPUT],
            output_names=[OUTPUT],
        )
    except Exception as error:  # jax2onnx raises many kinds
        raise InputError(
            f"jax2onnx cannot write this model: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}; docs/export.md says what goes: "
            + ("another reducer may" if batch else "a batch of a fixed size (--batch=N) may")
        ) from error
    with_matrix_products(model.graph)
    write_whole(path, model.SerializeToString())


def again(traced, images) -> jax.Array:
    """The only result of a traced function."""
    return run(traced.jaxpr, traced.consts, [images], {}, lambda value: value, fold=True)[0]


def padded(equation, inputs: list) -> list | None:
    """The rule for padding, which jax2onnx does for batches of a known size alone."""
    x, value = inputs
    config = equation.params["padding_config"]
    if any(inside or min(low, high) < 0 for low, high, inside in config):
        return None
    for axis, (low, high, _) in enumerate(config):
        front, back = (
            [jnp.broadcast_to(value, (*x.shape[:axis], side, *x.shape[axis + 1 :]))] if side else []
            for side in (low, high)
        )
        x = jnp.concatenate([*front, x, *back], axis=axis)
    return [x]


def either(equation, inputs: list) -> list | None:
    """The rule for a choice between two truth values, which onnxruntime does for numbers alone."""
    where, *cases = inputs
    if len(cases) != 2 or cases[0].dtype != jnp.bool_:
        return None
    return [(where & cases[1]) | (~where & cases[0])]


RULES = dict(pad=padded, select_n=either)


def with_matrix_products(graph) -> None:
    """Turns products of activations with a constant matrix into `MatMul`, whatever they are now.

    jax2onnx writes them as `Einsum`, and of two axes as `Gemm` with a factor of 0 for its bias.
    """
    kernels = {one.name for one in graph.initializer if len(one.dims) == 2}
    for node in graph.node:
        given = {one.name: one for one in node.attribute}
        if len(node.input) < 2 or node.input[1] not in kernels:
            continue
        if node.op_type == "Einsum":
            inputs, result = given["equation"].s.decode().replace(" ", "").split("->")
            left, right = inputs.split(",")
            plain = right[0] == left[-1] and result == left[:-1] + right[1]
        else:
            flipped = any(given[name].i for name in ("transA", "transB") if name in given)
            biased = "beta" not in given or given["beta"].f != 0
            plain = node.op_type == "Gemm" and not (biased or flipped)
        if not plain:
            continue
        node.op_type = "MatMul"
        del node.input[2:], node.attribute[:]


def load(path: str | Path) -> Callable[[np.ndarray], np.ndarray]:
    """The function in a file that `write` made, in onnxruntime on the CPU."""
    check_installed()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; not what it tidies up
    try:
        session = onnxruntime.InferenceSession(
            read(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of onnxruntime's own module
        raise InputError(
            f"onnxruntime cannot load {path}: {' '.join(str(error).split())[:300]}"
        ) from error
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: np.asarray(images, np.float32)})[0]


def tokens_after_blocks(path: str | Path, width: int, hidden: int) -> list[int]:
    """The tokens that enter each block's MLP, read from the shapes in the graph.

    Of the last block these are the ones that logits read, where they do not read all.

    Args:
      width, hidden: of the model, by which an MLP's first layer is known.
    """
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(read(path))).graph
    kernels = {one.name for one in graph.initializer if tuple(one.dims) == (width, hidden)}
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    outputs = [
        node.output[0]
        for node in graph.node
        if node.op_type.startswith("MatMul") and not kernels.isdisjoint(node.input)
    ]
    return [shapes[name][1] for name in outputs if len(shapes.get(name, ())) == 3]


def quantize_file(path: Path, out: Path) -> int:
    """Writes a model that `write` wrote with 8-bit linear layers, as `export.quantize` has them.

    Each product of activations with a constant matrix becomes a `MatMulInteger` of both rounded.

    Returns:
      How many there are.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load_from_string(read(path))
    graph = model.graph
    constants = {one.name: one for one in graph.initializer}
    nodes, number = [], 0

    def constant(name: str, array: np.ndarray) -> str:
        graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    axis = constant("int8_axis", np.asarray([-1], np.int64))
    most = constant("int8_most", np.float32(MOST))
    tiny = constant("int8_tiny", np.float32(np.finfo(np.float32).tiny))
    for node in graph.node:
        kernel = constants.get(node.input[1]) if node.op_type == "MatMul" else None
        if kernel is None or len(kernel.dims) != 2 or kernel.data_type != onnx.TensorProto.FLOAT:
            nodes.append(node)
            continue
        number += 1
        weight = quantize(numpy_helper.to_array(kernel))
        x, y, base = node.input[0], node.output[0], f"{node.output[0]}_int8"
        values = constant(f"{base}_values", weight.values)
        channels = constant(f"{base}_channels", weight.scale)
        steps = (
            ("Abs", [x], "abs"),
            ("ReduceMax", [f"{base}_abs", axis], "max"),
            ("Div", [f"{base}_max", most], "scale"),
            ("Max", [f"{base}_scale", tiny], "divisor"),
            ("Div", [x, f"{base}_divisor"], "ratio"),
            ("Round", [f"{base}_ratio"], "round"),
            ("Cast", [f"{base}_round"], "cast"),
            ("MatMulInteger", [f"{base}_cast", values], "sums"),
            ("Cast", [f"{base}_sums"], "float"),
            ("Mul", [f"{base}_float", f"{base}_scale"], "scaled"),
            ("Mul", [f"{base}_scaled", channels], None),
        )
        kinds = dict(cast=onnx.TensorProto.INT8, float=onnx.TensorProto.FLOAT)
        for kind, inputs, name in steps:
            more = dict(to=kinds[name]) if kind == "Cast" else {}
            more |= dict(keepdims=1) if kind == "ReduceMax" else {}
            output = f"{base}_{name}" if name else y
            nodes.append(helper.make_node(kind, inputs, [output], **more))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [one for one in graph.initializer if one.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    write_whole(out, model.SerializeToString())
    return number
