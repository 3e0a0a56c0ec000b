"""What runs on a device: contracts, engine, trainer, agent. Never imports torch."""
