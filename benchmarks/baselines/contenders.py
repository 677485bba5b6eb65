"""The contenders by name, and the file of each. Imports nothing."""

CONTENDERS = {
    "published-8bit": "published",
    "published-4bit": "published",
    "resident": "resident",
    "one-shot-fp32": "resident",
    "model-offload": "model_offload",
    "model-offload-tiling": "model_offload",
    "model-offload-slicing": "model_offload",
    "sequential-offload": "sequential_offload",
    "group-offload-block": "group_offload",
    "group-offload-leaf": "group_offload",
    "reference": "reference",
    "lowvram": "lowvram",
}

# What T5 computes in, where it is not what all the rest is loaded in.
_QUANTISED = {"published-8bit": "8 bits", "published-4bit": "4 bits"}
_IN_BF16 = ("reference", "lowvram")


def text_encoder(contender: str, dtype: str = "fp16") -> str:
    """The text encoder's precision: outputs are equal within rounding only where it is the same.

    Args:
        dtype: that of the run.
    """
    own = "bf16" if contender in _IN_BF16 and dtype == "fp16" else dtype
    return _QUANTISED.get(contender, own)
