# SPDX-License-Identifier: Apache-2.0
"""Speed, measured honestly."""
