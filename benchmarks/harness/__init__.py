"""What the benchmarks share: contenders in their own environments, timing in turns, results as JSON."""
