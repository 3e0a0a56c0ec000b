"""Sums of devices' updates that are the only thing an aggregator learns: a grid, masks, and shares of their seeds."""
