"""Reads how this machine does, for who looks at the job."""

from fleetune.device_runtime.agent.vitals import Vitals
from fleetune.device_runtime.commands.peak_memory import rss_mb
from fleetune.device_runtime.rules.sensors import Sensors


def own_vitals() -> Vitals:
    """Read memory of this process and the hottest thermal zone; what is not there is 0."""
    found = Sensors(wanted=("temperature",)).read().temperature
    return Vitals(memory_mb=rss_mb(), temperature_c=found or 0.0)
