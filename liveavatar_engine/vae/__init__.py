"""Wan 2.1's causal video VAE: encoding of conditions, streaming decode of the stream's latents."""
