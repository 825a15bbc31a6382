# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np

from evit_jax.training.losses import (
    Distillation,
    binary_cross_entropy,
    cross_entropy,
    divergence,
    reported,
    smooth_labels,
    teacher_tokens,
)


def test_smoothing_spreads_over_all_classes():
    targets = smooth_labels(jnp.asarray([2, 0]), 4, 0.1)
    np.testing.assert_allclose(targets[0], [0.025, 0.025, 0.925, 0.025], rtol=1e-6)
    np.testing.assert_allclose(targets.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(smooth_labels(jnp.asarray([1]), 3, 0.0)[0], [0, 1, 0])


def test_cross_entropy_is_the_formula_and_stays_finite_for_large_logits():
    logits, targets = jnp.asarray([[1.0, 2.0, 0.5]]), jnp.asarray([[0.2, 0.7, 0.1]])
    softmax = np.exp([1, 2, 0.5]) / np.exp([1, 2, 0.5]).sum()
    expected = -(np.array([0.2, 0.7, 0.1]) * np.log(softmax)).sum()
    np.testing.assert_allclose(cross_entropy(logits, targets), [expected], rtol=1e-6)
    huge = cross_entropy(jnp.asarray([[1e4, 0.0]], jnp.bfloat16), jnp.asarray([[0.0, 1.0]]))
    assert huge.dtype == jnp.float32
    np.testing.assert_allclose(huge, 9984, rtol=1e-6)  # 1e4 in bfloat16


def test_binary_cross_entropy_takes_every_class_of_a_mixed_image_as_there():
    logits, targets = np.array([[1.0, -2.0, 0.5]]), np.array([[0.3, 0.0, 0.7]])
    there = 1 / (1 + np.exp(-logits[0]))
    expected = -(np.log(there[0]) + np.log(1 - there[1]) + np.log(there[2])) / 3
    loss = binary_cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(loss, [expected], rtol=1e-6)
    huge = binary_cross_entropy(jnp.asarray([[1e4, -1e4]], jnp.bfloat16), jnp.asarray([[0.0, 1.0]]))
    assert huge.dtype == jnp.float32
    np.testing.assert_allclose(huge, 9984, rtol=1e-6)  # 1e4 in bfloat16


def test_divergence_is_zero_for_the_same_distribution_and_takes_zero_targets():
    logits = jnp.asarray([[1.0, -2.0, 0.5]])
    np.testing.assert_allclose(divergence(logits, jax.nn.softmax(logits)), [0], atol=1e-6)
    p, q = np.array([0.5, 0.5, 0]), np.asarray(jax.nn.softmax(logits))[0]
    expected = (p[:2] * np.log(p[:2] / q[:2])).sum()
    np.testing.assert_allclose(divergence(logits, jnp.asarray([p])), [expected], rtol=1e-6)


def test_hard_distillation_is_deits_equation_3():
    student, teacher = jnp.asarray([[1.0, 2.0, 0.5]]), jnp.asarray([[3.0, -1.0, 2.9]])
    hard, base = Distillation(hard=True, alpha=0.5), jnp.asarray([0.8])
    got = hard.loss(base, student, hard.targets(teacher))
    decided = -np.log(np.exp(1) / np.exp([1, 2, 0.5]).sum())  # the teacher says class 0
    np.testing.assert_allclose(got, [0.4 + 0.5 * decided], rtol=1e-6)


def test_soft_distillation_is_deits_equation_2():
    student, teacher = jnp.asarray([[1.0, 2.0, 0.5]]), jnp.asarray([[3.0, -1.0, 2.9]])
    soft = Distillation(hard=False, alpha=0.1, temperature=3.0)
    got = soft.loss(jnp.asarray([0.8]), student, soft.targets(teacher))
    p, q = (
        np.exp(z / 3) / np.exp(z / 3).sum() for z in (np.array([3, -1, 2.9]), np.array([1, 2, 0.5]))
    )
    expected = 0.9 * 0.8 + 0.1 * 9 * (p * np.log(p / q)).sum()
    np.testing.assert_allclose(got, [expected], rtol=1e-6)


def test_no_gradient_reaches_the_teacher():
    for kind in (Distillation(hard=True), Distillation(hard=False)):
        grads = jax.grad(lambda z, kind=kind: kind.targets(z).max())(jnp.asarray([[1.0, 2.0]]))
        np.testing.assert_array_equal(grads, 0)


def test_the_token_loss_is_of_patches_with_a_token_of_their_own():
    rng = np.random.default_rng(0)
    dense, targets = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    owner = jnp.asarray([[0, -1, 2, 2, 1], [-1] * 5, [0, 1, 2, 3, 4]])
    alone = [[0, 4], [], [0, 1, 2, 3, 4]]
    loss = Distillation(tokens=0.5).token_loss(
        dict(dense=dense, owner=(owner,), aux={}), dict(dense=targets)
    )
    square = (dense - targets).astype(np.float64) ** 2
    expected = [0.5 * square[i, which].mean() if which else 0 for i, which in enumerate(alone)]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    nothing_reduced = dict(dense=dense, owner=(), aux={})
    whole = Distillation(tokens=1.0).token_loss(nothing_reduced, dict(dense=targets))
    np.testing.assert_allclose(whole, square.mean(axis=(1, 2)), rtol=1e-5)


def test_recovered_tokens_learn_the_teachers_after_the_last_blocks():
    rng = np.random.default_rng(0)
    blocks = rng.normal(size=(4, 2, 1 + 5, 3)).astype(np.float32)  # 4 blocks, class token first
    teacher = dict(dense=jnp.zeros((2, 5, 3)), blocks=tuple(jnp.asarray(blocks)))
    recovered = rng.normal(size=(2, 2, 5, 3)).astype(np.float32)  # after the last two

    def loss(recovered, teacher):
        out = dict(aux=dict(recovered=tuple(recovered)))
        return Distillation(tokens=0.5).token_loss(out, teacher_tokens(teacher))

    differences = [recovered[0] - blocks[2][:, 1:], recovered[1] - blocks[3][:, 1:]]
    differences = np.asarray(differences, np.float64)
    expected = 0.5 * (differences**2).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(loss(recovered, teacher), expected, rtol=1e-5)
    grads = jax.grad(lambda *args: loss(*args).sum(), argnums=(0, 1))(recovered, teacher)
    np.testing.assert_allclose(grads[0], 0.5 * 2 * differences / (2 * 5 * 3), rtol=1e-5)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(grads[1]))


def test_reported_losses_and_logits_are_added():
    targets = jax.nn.one_hot(jnp.asarray([2, 0]), 3)
    logits = jnp.asarray([[1.0, 2.0, 0.5], [0.0, 1.0, 0.0]])
    loss = jnp.asarray([0.25, 1.0])
    assert reported(dict(counts=(loss,)), targets) == 0
    total = reported(dict(loss=(loss, loss), logits=(logits,)), targets)
    np.testing.assert_allclose(total, 2 * loss + cross_entropy(logits, targets), rtol=1e-6)
