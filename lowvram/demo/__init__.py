"""The embedded checkpoint: a small PixArt-Sigma that draws one coloured shape, and its making."""
