"""benchmarks/README.md from the files in benchmarks/results: every number comes from there."""
