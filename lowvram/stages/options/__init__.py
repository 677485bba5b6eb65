"""The ways in which each stage can work, fastest first, each with what it needs."""
