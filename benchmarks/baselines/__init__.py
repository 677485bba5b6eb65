"""What people use today, each contender run in a process of its own and measured alike.

    python -m benchmarks.baselines published-8bit --model FOLDER --size 1024 --output out

One JSON line on stdout says what it took; `__main__.py` has the fields. Every contender draws the
same noise, encodes the same text and computes the size that was asked: see `request.py`.
"""
