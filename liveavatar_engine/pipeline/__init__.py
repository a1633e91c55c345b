"""Who runs what where: the engine, its sessions, the devices."""
