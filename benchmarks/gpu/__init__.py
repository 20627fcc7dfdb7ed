"""One script for each family of rows of `benchmarks.bench_gpu`: a case in a process of its own, a line of JSON."""
