"""From noise to the latents of a block: schedule, noise, caches, positions, steps."""
