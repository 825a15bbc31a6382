# SPDX-License-Identifier: Apache-2.0
"""Pictures and plots in Pillow; nothing here imports JAX."""
