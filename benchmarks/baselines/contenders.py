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
    "lowvram": "lowvram",
}

# What T5's weights are in, in half precision: outputs are equal within rounding only among those
# that share it.
TEXT_ENCODER = {"published-8bit": "8 bits", "published-4bit": "4 bits", "lowvram": "bf16"}


def text_encoder(contender: str, dtype: str = "fp16") -> str:
    """What the text encoder computes in: pipelines load it in the dtype of all the rest."""
    return dtype if dtype != "fp16" else TEXT_ENCODER.get(contender, dtype)
