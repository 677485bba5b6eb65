"""What `benchmarks/gpu.py` measures with: rows and how they are kept, run, compared and shown."""
