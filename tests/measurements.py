"""Where tests on a GPU note what they measured: one JSON object a line, for whoever asks for it."""

import json
import os


def note(**fields: object) -> None:
    """Append to the file that LOWVRAM_CUDA_REPORT names, if it does; several processes may."""
    path = os.environ.get("LOWVRAM_CUDA_REPORT")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")
