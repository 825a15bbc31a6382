# SPDX-License-Identifier: Apache-2.0
"""Weight files in and out: bytes, names and layouts, positions, the hub."""
