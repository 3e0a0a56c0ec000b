"""What the benchmarks share: models to measure on, processes to measure in, and sums over repeats."""
