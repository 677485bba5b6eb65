"""How a VAE decodes, and how pixels become a picture's file."""
