#!/usr/bin/env python3
"""Latents to pictures, with the VAE alone.

    scripts/decode.py cactus.latents.safetensors -o cactus.png

The arguments are those of `lowvram decode`. Sets up its own environment first.
"""

import sys

from _environment import become, executable, prepare

if __name__ == "__main__":
    prepare()
    become([executable("lowvram"), "decode", *sys.argv[1:]])
