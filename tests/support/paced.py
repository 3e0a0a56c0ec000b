"""A real device whose steps take a time that is given: a tiny model's take none to speak of."""

import time

import flat

from fleetune.device_runtime.training.trainer import Trainer


def device(artifact, *, pace_s, **options):
    """As ``flat.device``; each step takes ``pace_s`` more."""
    step = Trainer.step

    def slowed(self):
        begun_s = time.perf_counter()
        time.sleep(pace_s)
        return step(self)._replace(seconds=time.perf_counter() - begun_s)

    Trainer.step = slowed
    return flat.device(artifact, **options)
