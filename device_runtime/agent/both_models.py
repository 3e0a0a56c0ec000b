"""A device's own model and the global one, measured on the same samples of the device."""

from collections.abc import Callable

from fleetune.device_runtime.agent.trainer_port import Measured
from fleetune.device_runtime.arrays import Arrays


def measure_both(
    evaluate: Callable[[Arrays], Measured | None], own: Arrays, reference: Arrays
) -> dict[str, float]:
    """Measure what personal layers gain, as figures of an update.

    Args:
        evaluate: measures an adapter on samples that were kept back from training; None if there are none.
        own: the device's adapter after training: its personal layers, and the shared ones and the head as trained.
        reference: the version as it came.

    Returns:
        ``personal_loss``, ``personal_accuracy``, ``global_loss`` and ``global_accuracy``; empty without samples.
    """
    mine = evaluate(own)
    everyones = evaluate(reference) if mine else None
    if mine is None or everyones is None:
        return {}
    return {
        "personal_loss": mine.loss,
        "personal_accuracy": mine.accuracy,
        "global_loss": everyones.loss,
        "global_accuracy": everyones.accuracy,
    }
