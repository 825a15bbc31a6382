# SPDX-License-Identifier: Apache-2.0
"""Devices, processes, and what is done in the background."""
