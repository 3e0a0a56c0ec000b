"""Runs an artifact's graphs there and back: from a batch and a layer plan to loss and gradients."""
