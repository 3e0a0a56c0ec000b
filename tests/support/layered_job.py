"""Jobs of a model of 12 layers, for the configurators that choose depths."""

from rounds_by_hand import job


def deep_job(*, num_layers=12, **changes):
    """Settings as :func:`rounds_by_hand.job` makes them."""
    return job(num_layers=num_layers, **changes)
