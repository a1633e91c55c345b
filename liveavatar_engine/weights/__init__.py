"""Checkpoint files to modules: layout, shards, adapters and the parts around the network."""
