"""benchmarks/README.md from the files in benchmarks/results: every number in it comes from there."""
