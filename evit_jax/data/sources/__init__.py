# SPDX-License-Identifier: Apache-2.0
"""One file per data set; see `evit_jax.data` for what it defines."""
