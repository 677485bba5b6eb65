#!/bin/sh
# Measure side by side on a GPU: see benchmarks/gpu.py. PYTHON names another interpreter.
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
[ -n "$PYTHON" ] || [ ! -x .venv/bin/python ] || python=.venv/bin/python
exec "$python" benchmarks/gpu.py "$@"
