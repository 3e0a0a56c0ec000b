"""What a run may use of its machine."""

from typing import Annotated

import msgspec

from fleetune.device_runtime.options import Option


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What a run may use. A memory budget chooses rows at a time, ``recompute`` by layer and ``stream`` by itself."""

    threads: Annotated[int, Option("threads of the kernels; 0 for one a core", at_least=0)] = 0
    cores: Annotated[str, Option("cores to run on, as 0-3,6; all without it")] = ""
    provider: Annotated[
        str, Option("onnxruntime's provider: cpu, cuda, tensorrt or xnnpack", metavar="NAME")
    ] = "cpu"
    recompute: Annotated[
        bool, Option("recompute activations, or save them: less memory or less time", off="save")
    ] = False
    stream: Annotated[
        bool,
        Option(
            "one layer's frozen weights in memory at a time, or all: less memory or less time", off="resident"
        ),
    ] = False
    memory_budget_mb: Annotated[
        float,
        Option("fit the run into so much resident memory, in 10^6 bytes; 0 for no limit", at_least=0),
    ] = 0.0
    hidden_cache_mb: Annotated[
        float,
        Option(
            "disk for what the frozen layers below the trained ones give, in 10^6 bytes; 0 for none",
            at_least=0,
        ),
    ] = 0.0
