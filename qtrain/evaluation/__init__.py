"""Perplexity, drift between two models, and generated text."""
