"""Host side: models in, adapters out, and the command line."""
