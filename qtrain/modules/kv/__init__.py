"""Quantization of the key-value cache: in the training graph, and in a cache that stores codes."""
