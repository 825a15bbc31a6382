# SPDX-License-Identifier: Apache-2.0
"""Plain NumPy in float64, with loops: what the tests of single methods are worked out by."""

import numpy as np


def attention(signals, image):
    """(H, N, N): the attention map of one image, from its queries and keys."""
    q, k = (np.asarray(array[image], np.float64) for array in (signals.q, signals.k))
    maps = np.zeros((q.shape[0], q.shape[1], k.shape[1]))
    for head in range(q.shape[0]):
        for query in range(q.shape[1]):
            logits = np.array([q[head, query] @ key for key in k[head]])
            scores = np.exp(logits - logits.max())
            maps[head, query] = scores / scores.sum()
    return maps


def value_norms(signals, image):
    """(H, N): L2 norms of the values of one image."""
    v = np.asarray(signals.v[image], np.float64)
    return np.array([[np.sqrt(np.sum(value**2)) for value in head] for head in v])


def slopes(function, x, step=1e-6):
    """The gradient of a function of an array, by central differences."""
    x, slope = np.array(x, np.float64), np.zeros(np.shape(x))
    for at in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[at] += step
        low[at] -= step
        slope[at] = (function(high) - function(low)) / (2 * step)
    return slope
