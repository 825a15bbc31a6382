# SPDX-License-Identifier: Apache-2.0
"""Models as files that run without this package: StableHLO, ONNX and TensorFlow's SavedModel.

Each format has a file with `write` and `load`. What is written is a function of normalized images
(B, height, width, 3) float32 alone, parameters inside; what is loaded is that function, of NumPy
arrays, so that all formats are compared alike.
"""
