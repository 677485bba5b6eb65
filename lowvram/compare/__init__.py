"""What another way of working costs: the same prompts and seeds through each, and how they differ.

`comparison.compare` runs the stages as `run` does, each distinct one once; `differences` compares
the files that they leave (`metrics` has the formulas); `table`, `sheet` and `page` show what was
found. Imports no torch: what needs it runs in the stages' processes.
"""
