# SPDX-License-Identifier: Apache-2.0
"""Programs: python -m evit_jax.tools.NAME. The last line on standard output is one JSON object."""
