"""Timestep-forcing pipeline parallel: denoise steps and the decoder spread over several devices."""
