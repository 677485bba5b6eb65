#!/usr/bin/env bash
# Contenders side by side on a CPU; the options are those of benchmarks/cpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
exec nice "${PYTHON:-.venv/bin/python}" benchmarks/cpu.py "$@"
