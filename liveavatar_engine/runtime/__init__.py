"""How work gets onto a device: what is recorded and replayed, and small structs that change from block to block."""
