# SPDX-License-Identifier: Apache-2.0
"""Parity in stages with the official PyTorch EViT: embedding, blocks, kept tokens, gradients.

fixtures/reference holds weights (timm names, random values) and what the official code computed
from them in float64; a float32 run of that code agrees with it to 2e-6.
"""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from evit_jax.models import create_model
from evit_jax.training.losses import cross_entropy
from evit_jax.weights.files import read_tensors, write_safetensors
from evit_jax.weights.names import tensors_from_params

FOLDER = Path(__file__).parents[1] / "fixtures" / "reference"
CASES = [
    (path.stem, case["name"])
    for path in sorted(FOLDER.glob("*.json"))
    for case in json.loads(path.read_text())["cases"]
]
every_case = pytest.mark.parametrize(("name", "case"), CASES, ids=lambda value: value)


def build(name, case, weights):
    """Our model as the fixture was made, with its weights."""
    settings = json.loads((FOLDER / f"{name}.json").read_text())
    made, case = settings["model"], next(c for c in settings["cases"] if c["name"] == case)
    rates = made["keep_rate"] if len(made["keep_rate"]) > 1 else [1] * made["depth"]
    # A scalar rate applies to the layers built to reduce, and to no other.
    rates = [case.get("keep_rate", rate) if rate < 1 else 1 for rate in rates]
    return create_model(
        "vit",
        image_size=case["size"],
        patch_size=made["patch_size"],
        width=made["embed_dim"],
        depth=made["depth"],
        num_heads=made["num_heads"],
        num_classes=made["num_classes"],
        keep_rates=rates,
        reducer=dict(name="evit", fuse=made["fuse_token"]),
        weights=str(weights),
    )


@cache
def exported(name):
    """The fixture's weights after a trip through our parameters and our own export."""
    import tempfile

    folder = Path(tempfile.mkdtemp())
    model, params = build(name, CASES_OF[name][0], FOLDER / f"{name}.weights.safetensors")
    write_safetensors(folder / "ours.safetensors", tensors_from_params(params, model))
    return folder / "ours.safetensors"


CASES_OF = {name: [case for other, case in CASES if other == name] for name, _ in CASES}


@cache
def program(model):
    """(params, images, labels) -> ((loss, (logits, out)), gradients), compiled once per model."""

    def loss_of(params, images, labels):
        logits, out = model.apply({"params": params}, images)
        targets = jax.nn.one_hot(labels, logits.shape[-1])
        return jnp.mean(cross_entropy(logits, targets)), (logits, out)

    return jax.jit(jax.value_and_grad(loss_of, has_aux=True))


@cache
def computed(name, case, trip=False):
    """Everything the stages look at: expected arrays, ours, and gradients by timm name."""
    weights = exported(name) if trip else FOLDER / f"{name}.weights.safetensors"
    expected = load_file(FOLDER / f"{name}.{case}.safetensors")
    model, params = build(name, case, weights)
    images, labels = jnp.asarray(expected["image"]), jnp.asarray(expected["labels"])
    (loss, (logits, out)), grads = program(model)(params, images, labels)
    ours = dict(loss=loss, logits=logits, out=out, grads=grads)
    return model, params, expected, jax.tree.map(np.asarray, ours)


@every_case
def test_kept_tokens_and_their_order_are_identical(name, case):
    model, _, expected, ours = computed(name, case)
    reducing = [block for block, keep in enumerate(model.keep) if keep is not None]
    assert len(reducing) == sum(key.startswith("kept_") for key in expected)
    for number, block in enumerate(reducing):
        attention = ours["out"]["cls_attention"][block][:, 1:]
        order = np.argsort(-attention, axis=1, kind="stable")[:, : model.keep[block]]
        np.testing.assert_array_equal(order, expected[f"kept_{number}"])


@every_case
def test_every_block_agrees(name, case):
    _, _, expected, ours = computed(name, case)
    for block, tokens in enumerate(ours["out"]["blocks"]):
        reference = expected[f"block_{block}"]
        assert tokens.shape == reference.shape
        assert np.abs(tokens - reference).max() <= 1e-6 * np.abs(reference).max()


@every_case
@pytest.mark.parametrize("trip", [False, True], ids=["as given", "through our export"])
def test_logits_and_loss_agree(name, case, trip):
    _, _, expected, ours = computed(name, case, trip)
    np.testing.assert_allclose(ours["logits"], expected["logits"], rtol=0, atol=1e-5)
    assert abs(ours["loss"] - expected["loss"][0]) <= 2e-6


@every_case
@pytest.mark.parametrize("trip", [False, True], ids=["as given", "through our export"])
def test_the_gradient_of_every_weight_agrees(name, case, trip):
    model, _, expected, ours = computed(name, case, trip)
    grads = tensors_from_params(ours["grads"], model)
    reference = {key[5:]: value for key, value in expected.items() if key.startswith("grad/")}
    assert grads.keys() == reference.keys()
    for key, value in reference.items():
        if key == "pos_embed" and value.shape != grads[key].shape:
            continue  # tested below
        error = np.linalg.norm(grads[key] - value)
        assert error <= 1e-5 * np.linalg.norm(value), key


@pytest.mark.parametrize(("name", "case"), [c for c in CASES if c[1] == "larger_image"])
def test_the_gradient_of_resized_positions_agrees_in_the_stored_table(name, case):
    from evit_jax.weights.positions import resize_positions

    model, params, expected, _ = computed(name, case)
    stored = read_tensors(FOLDER / f"{name}.weights.safetensors")["pos_embed"]
    images, labels = jnp.asarray(expected["image"]), jnp.asarray(expected["labels"])

    def loss_of(table):
        resized = resize_positions(params | {"pos_embed": table}, model)
        logits, _ = model.apply({"params": resized}, images)
        return jnp.mean(cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])))

    grad, reference = jax.jit(jax.grad(loss_of))(jnp.asarray(stored)), expected["grad/pos_embed"]
    assert np.linalg.norm(grad - reference) <= 1e-5 * np.linalg.norm(reference)
