#!/usr/bin/env python3
"""Prompts to embeddings, with the text encoder alone.

    scripts/encode.py "a cactus" -m demo -o cactus.embeds.safetensors

The arguments are those of `lowvram encode`. Sets up its own environment first.
"""

import sys

from _environment import become, executable, prepare

if __name__ == "__main__":
    prepare()
    become([executable("lowvram"), "encode", *sys.argv[1:]])
