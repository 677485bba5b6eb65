#!/usr/bin/env python3
"""Embeddings to latents, with the transformer alone.

    scripts/denoise.py cactus.embeds.safetensors --seed 7

The arguments are those of `lowvram denoise`. Sets up its own environment first.
"""

import sys

from _environment import become, executable, prepare

if __name__ == "__main__":
    prepare()
    become([executable("lowvram"), "denoise", *sys.argv[1:]])
