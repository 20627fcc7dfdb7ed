"""Measurements; `python -m benchmarks.bench_gpu --plan` lists those that need a GPU."""
