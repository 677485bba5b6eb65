"""What was asked, resolved once: after it nothing is open.

`resolve_encode`, `resolve_denoise` and `resolve_decode` check a user's words against the model's
configuration files (no weights, no torch) and return a task: a frozen value of JSON types that a
stage carries out, in this process or in another. `resolve_run` does so for all three, and for
encode-image where a picture comes before them.
"""
