"""What runs on a device: contracts, engine, trainer, agent. Never imports torch. Each folder is a room with walls."""
