"""A device's life in a federation: messages in, messages out. Knows no engine: its work comes through `trainer_port`."""
