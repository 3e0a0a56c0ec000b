"""Steps that hide each sample, DP-SGD: secret batches, gradients of bounded norm, and noise on their sum.

Source: Abadi et al., arXiv 1607.00133, algorithm 1. Ours: draws that follow from a secret of the device, so that a run that was
killed goes on to the bit and the same step never has two noises; and that a gradient which is not finite counts for nothing.
"""

from collections.abc import Mapping
from hashlib import sha256

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Arrays, Indices, to_bytes
from fleetune.device_runtime.contracts.codecs.codec import Doubles
from fleetune.device_runtime.contracts.gaussian import bounded, derived, gaussian
from fleetune.device_runtime.training.checkpoint import Origin

TOGETHER = 16
"""Samples whose gradients are asked for at once, one after the other, padded to the longest of them."""


class SamplePrivacy:
    """The draws of one run. Whoever knows neither the secret nor the data can make none of them again."""

    def __init__(self, origin: Origin, *, num_samples: int, secret: bytes) -> None:
        """Prepare.

        Args:
            origin: the run, whose work hides samples; runs that differ in their length alone begin alike.
            num_samples: that train.
            secret: of the device, from the operating system.
        """
        self._work, self._num_samples, self._secret = origin.work, num_samples, secret
        self._run = sha256(msgspec.json.encode(_of_any_length(origin))).digest()
        self._expected = self._work.sample_rate * num_samples

    def batch(self, step: int) -> Indices:
        """Draw the samples of a step, each by itself with the work's rate: int64 (B,), ascending; B may be 0."""
        source = derived(self._secret, b"samples", self._run, step.to_bytes(8, "big"))
        drawn = np.frombuffer(source(8 * self._num_samples), "<u8") >> np.uint64(11)
        return np.flatnonzero(drawn < self._work.sample_rate * 2.0**53)

    def clipped(self, grads: Arrays) -> Arrays:
        """Scale one sample's gradient to the work's norm at most, over all tensors together, in float64."""
        whole: dict[str, Doubles] = {name: np.asarray(value, np.float64) for name, value in grads.items()}
        if not all(np.isfinite(value).all() for value in whole.values()):
            return {name: np.zeros_like(value) for name, value in whole.items()}
        return dict(bounded(whole, self._work.sample_clip).change)

    def hidden(self, step: int, sums: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> Arrays:
        """Make a step's gradient, float32, of the sum of clipped ones: with noise, over as many as a batch should have.

        Args:
            step: from 0.
            sums: float64 by tensor name; what no sample has reached is missing.
            shapes: of every tensor that the step trains, whatever its batch. All of them get noise.
        """
        source = derived(
            self._secret, b"noise", self._run, step.to_bytes(8, "big"), sha256(to_bytes(sums)).digest()
        )
        deviation = self._work.sample_noise * self._work.sample_clip
        found: Arrays = {}
        for name in sorted(shapes):
            total = deviation * gaussian(shapes[name], source)
            if name in sums:
                total += np.asarray(sums[name], np.float64)
            found[name] = np.asarray(total / self._expected, np.float32)
        return found


def in_groups(samples: Indices) -> list[Indices]:
    """Cut a batch, in its order; an empty one has no group."""
    return [samples[start : start + TOGETHER] for start in range(0, len(samples), TOGETHER)]


def _of_any_length(origin: Origin) -> Origin:
    """A run as it is known by until its end: where the rate decays, or rounds came before, its length tells in every step."""
    work = origin.work
    if work.optimizer.decay != "constant" or work.rounds_before:
        return origin
    return origin.of_any_length
