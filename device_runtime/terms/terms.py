"""The device's own contract as one struct: what its owner allows an aggregator to ask. Nobody else can change it."""

from typing import Annotated

import msgspec

from fleetune.device_runtime.options import Option


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Floors and ceilings of one device. 0 is no limit, and an empty list of names is all of them.

    Why the defaults are what they are is in ``docs/privacy.md``.
    """

    least_samples: Annotated[
        int, Option("of this device's own samples behind an update, each counted once", at_least=0)
    ] = 8
    least_effective: Annotated[
        int,
        Option(
            "samples behind an update in effect: where few outweigh the others, those few count", at_least=0
        ),
    ] = 32
    least_batch: Annotated[
        int,
        Option(
            "samples in every step that a layer learns from; spare ones of the data do not train", at_least=0
        ),
    ] = 4
    least_steps: Annotated[int, Option("steps behind an update", at_least=0)] = 1
    least_of_a_class: Annotated[
        int, Option("samples of a class behind its mean; classes with fewer are left out", at_least=0)
    ] = 4
    most_steps: Annotated[int, Option("steps in a round", at_least=0)] = 100_000
    most_seconds: Annotated[float, Option("seconds of work in a round", at_least=0, at_most=1e9)] = 43_200.0
    most_step_seconds: Annotated[
        float, Option("seconds of one step, which is stopped then", at_least=0, at_most=1e9)
    ] = 3600.0
    most_batch: Annotated[int, Option("samples in a step", at_least=0)] = 1024
    most_tokens: Annotated[int, Option("tokens of a sample (seq_len)", at_least=0)] = 8192
    most_rounds_a_day: Annotated[int, Option("rounds and evaluations in 24 hours", at_least=0)] = 1000
    most_bytes_a_day: Annotated[
        float, Option("bytes of updates sent in 24 hours", at_least=0, at_most=1e18)
    ] = 4e9
    policies: Annotated[
        str, Option("layer policies that may be asked for, separated by commas", metavar="NAMES")
    ] = ""
    may_leave: Annotated[
        str,
        Option(
            "tensors that may leave: kinds (embeddings, head, lora) or patterns as '*.classifier.*', separated by commas",
            metavar="NAMES",
        ),
    ] = ""
    must_stay: Annotated[
        str, Option("tensors that never leave, as those of may-leave are named", metavar="NAMES")
    ] = ""
    most_change: Annotated[
        float,
        Option(
            "root mean square of what an update changes an element by; a larger update is scaled down to it",
            at_least=0,
            at_most=1e6,
        ),
    ] = 1.0
    least_noise: Annotated[
        float,
        Option(
            "noise that this device adds to an update, by its standard deviation in the update's largest norm",
            at_least=0,
            at_most=1e6,
        ),
    ] = 0.0
    most_epsilon: Annotated[
        float,
        Option(
            "epsilon of one sample of this device's data, over all rounds and jobs of dp sample; 0 for any",
            at_least=0,
            at_most=1e6,
        ),
    ] = 8.0
    delta: Annotated[
        float,
        Option("chance that most-epsilon does not hold; less than 1 in so many samples", above=0, below=1),
    ] = 1e-5
    private_only: Annotated[bool, Option("decline training that does not hide each sample (dp sample)")] = (
        False
    )
    tell_figures: Annotated[
        bool,
        Option("send losses, times and norms with an update, or never do", off="keep-figures"),
    ] = True
    secure_only: Annotated[
        bool, Option("decline training whose update the aggregator would see by itself (secure masks)")
    ] = False
