"""Layer-droppable LoRA training on edge devices, federated over MQTT.

The public door: what each command of the command line does is a function here, imported when first used, and so are
the structs that it takes.

    from fleetune import LocalWork, OptimizerSpec, train

    train("artifact", data="mine.jsonl", out="run", work=LocalWork(steps=100, optimizer=OptimizerSpec(lr=1e-3)))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fleetune.broker.aggregation import aggregate
    from fleetune.broker.jobs.members import Members
    from fleetune.broker.jobs.patience import Patience
    from fleetune.broker.jobs.privacy import Privacy
    from fleetune.broker.jobs.settings import Job
    from fleetune.broker.servers.embedded import EmbeddedServer
    from fleetune.device_runtime.agent.identity import Duty
    from fleetune.device_runtime.commands.device import device
    from fleetune.device_runtime.commands.generate import generate
    from fleetune.device_runtime.commands.inspect import inspect
    from fleetune.device_runtime.commands.predict import predict
    from fleetune.device_runtime.commands.selfcheck import selfcheck
    from fleetune.device_runtime.commands.train import train
    from fleetune.device_runtime.contracts.resources import Resources
    from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
    from fleetune.device_runtime.methods.sampling import Sampling
    from fleetune.device_runtime.network.address import Reach
    from fleetune.device_runtime.network.signing import Signing, Trust
    from fleetune.device_runtime.terms.terms import Terms
    from fleetune.toolkit.demo import demo
    from fleetune.toolkit.export import export
    from fleetune.toolkit.merge import merge
    from fleetune.toolkit.plot import plot
    from fleetune.toolkit.together import together

__all__ = [
    "Duty",
    "EmbeddedServer",
    "Job",
    "LocalWork",
    "Members",
    "OptimizerSpec",
    "Patience",
    "PolicySpec",
    "Privacy",
    "Reach",
    "Resources",
    "Sampling",
    "Signing",
    "Terms",
    "Trust",
    "aggregate",
    "demo",
    "device",
    "export",
    "generate",
    "inspect",
    "merge",
    "plot",
    "predict",
    "selfcheck",
    "together",
    "train",
]

_HOMES = {
    "Duty": "fleetune.device_runtime.agent.identity",
    "EmbeddedServer": "fleetune.broker.servers.embedded",
    "Job": "fleetune.broker.jobs.settings",
    "LocalWork": "fleetune.device_runtime.contracts.work",
    "OptimizerSpec": "fleetune.device_runtime.contracts.work",
    "Members": "fleetune.broker.jobs.members",
    "Patience": "fleetune.broker.jobs.patience",
    "PolicySpec": "fleetune.device_runtime.contracts.work",
    "Privacy": "fleetune.broker.jobs.privacy",
    "Reach": "fleetune.device_runtime.network.address",
    "Signing": "fleetune.device_runtime.network.signing",
    "Trust": "fleetune.device_runtime.network.signing",
    "Resources": "fleetune.device_runtime.contracts.resources",
    "Sampling": "fleetune.device_runtime.methods.sampling",
    "Terms": "fleetune.device_runtime.terms.terms",
    "aggregate": "fleetune.broker.aggregation",
    "demo": "fleetune.toolkit.demo",
    "device": "fleetune.device_runtime.commands.device",
    "export": "fleetune.toolkit.export",
    "generate": "fleetune.device_runtime.commands.generate",
    "inspect": "fleetune.device_runtime.commands.inspect",
    "merge": "fleetune.toolkit.merge",
    "plot": "fleetune.toolkit.plot",
    "predict": "fleetune.device_runtime.commands.predict",
    "selfcheck": "fleetune.device_runtime.commands.selfcheck",
    "together": "fleetune.toolkit.together",
    "train": "fleetune.device_runtime.commands.train",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
