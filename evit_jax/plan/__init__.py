# SPDX-License-Identifier: Apache-2.0
"""Which tokens each block keeps, as Python ints; nothing here imports JAX."""
