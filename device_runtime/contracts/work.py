"""What a device is asked to do: the work of one task, its layer policy and optimizer, and the words they are said in."""

from typing import Annotated

import msgspec
from msgspec import Meta

from fleetune.device_runtime.contracts.fields import COUNT_MAX, ClassWeights, Word
from fleetune.device_runtime.draws import SEED_MAX
from fleetune.device_runtime.options import Option

ADAPTER, CLASS_MEANS = LEARNED = ("adapter", "class-means")
"""What may come of a device's work."""
HEAD_STARTS = ("none", "class-mean")
"""What a model's head may begin with: as it was exported, or the class means of all training data."""
FULL = "full"
"""The down codec of an adapter that is sent as it is, as the bytes of its safetensors file. In a job: to the bit, in whatever
way is shorter."""
WHOLE = "whole"
"""In a job alone: always as it is, whatever a device holds."""
CONSENSUS, THRESHOLDS, NOTHING = MASKS = ("consensus", "thresholds", "nothing")
"""What :attr:`LocalWork.mask` may name."""
MASKED, GRID = SUMMED = ("masked", "grid")
"""Codecs of work whose updates are whole numbers that are only ever summed, under masks or (to compare) without."""
SAMPLE_NOISE_MAX, SAMPLE_RATE_MIN = 1e6, 1e-6
"""Of DP-SGD."""
LORA_A = "lora-a"
"""What :attr:`LocalWork.frozen` may name."""


class PolicySpec(msgspec.Struct, frozen=True, kw_only=True):
    """A layer policy by name. ``drop`` is the mean share of layers dropped, or not trained if the policy drops none.

    Steps are counted through all rounds. What a policy has no use for stands at its default.
    """

    name: Annotated[Word, Option("which layers train in a step", table="policy")] = "full"
    drop: Annotated[
        float,
        Option(
            "mean share of layers dropped (coto: without adapter; those that drop none: not trained), 0 to below 1",
            at_least=0,
            below=1,
        ),
    ] = 0.0
    shape: Annotated[Word, Option("which layers are dropped more", table="depth shape")] = "uniform"
    period: Annotated[
        int,
        Option(
            "successive, cyclic: steps on one group of layers; growing: until the suffix grows; 0 for all others",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    schedule: Annotated[Word, Option("how the share dropped goes over the steps", table="schedule")] = (
        "constant"
    )
    horizon: Annotated[
        int,
        Option(
            "step at which dropping has fallen to nothing, or ends; 0 for schedule constant",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    protected: Annotated[int, Option("so many layers are never dropped", at_least=0, at_most=COUNT_MAX)] = 0
    protect: Annotated[
        Word, Option("which: the outermost, or those whose absence tells most", choices=("ends", "effect"))
    ] = "ends"
    gates: Annotated[
        Word,
        Option("what a dropped layer is dropped for: a batch, or some of its rows", choices=("batch", "row")),
    ] = "batch"
    width: Annotated[
        int,
        Option(
            "growing: layers trained at first, and more in each period; block: layers trained; dropbp, coto: topmost "
            "layers that take part, 0 for all",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    first: Annotated[int, Option("block: lowest layer trained", at_least=0, at_most=COUNT_MAX)] = 0


class OptimizerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a device descends; in a federation afresh in every round."""

    name: Annotated[Word, Option("optimizer", table="optimizer")] = "adamw"
    lr: Annotated[float, Option("learning rate at its peak", above=0)] = 2e-3
    weight_decay: Annotated[
        float, Option("weight decay, as torch's optimizer of that name takes it", at_least=0)
    ] = 0.0
    warmup_steps: Annotated[int, Option("steps of linear warm-up", at_least=0, at_most=COUNT_MAX)] = 0
    decay: Annotated[Word, Option("the rate after the warm-up", table="decay")] = "constant"
    clip_norm: Annotated[
        float, Option("clip the global gradient norm to this; 0 for no clipping", at_least=0)
    ] = 0.0
    proximal: Annotated[
        float,
        Option("pull to the adapter that the run started from, FedProx's mu; 0 for none", at_least=0),
    ] = 0.0


class LocalWork(msgspec.Struct, frozen=True, kw_only=True):
    """What a device does in one round. ``steps`` = 0 means ``epochs`` passes over its data."""

    policy: PolicySpec = PolicySpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    steps: Annotated[
        int,
        Option("steps, in a federation of each round; 0 to count epochs", at_least=0, at_most=COUNT_MAX),
    ] = 0
    epochs: Annotated[
        int,
        Option(
            "passes over the data, in a federation in each round, if steps is 0",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 1
    batch_size: Annotated[int, Option("samples a step", at_least=1, at_most=COUNT_MAX)] = 16
    seq_len: Annotated[int, Option("longest sequence, in tokens", at_least=1, at_most=COUNT_MAX)] = 128
    seed: Annotated[int, Option("seed of everything random", at_least=0, below=SEED_MAX + 1)] = 0
    codec: Annotated[Word, Option("how updates are packed", table="codec")] = "fp32"
    codec_ratio: Annotated[
        float, Option("topk, caesar: share of the elements that is sent up; 0 for all others", at_least=0)
    ] = 0.0
    codec_bits: Annotated[
        int,
        Option(
            "bits of a value that is sent up, where the codec has a choice; 0 for the codec's own",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    rounds_before: Annotated[
        int,
        Option(
            "rounds of the job before this one, as long as this one: a policy counts its steps on",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    learns: Annotated[
        Word,
        Option(
            "what comes of the work: a trained adapter, or sums for a class-mean head from one forward pass",
            choices=LEARNED,
        ),
    ] = ADAPTER
    held_out: Annotated[
        float,
        Option(
            "share of a device's own samples kept back from training, to measure what a round has gained; 0 for none",
            at_least=0,
            at_most=0.5,
        ),
    ] = 0.0
    cache_below: Annotated[
        int,
        Option(
            "no layer below this one learns on any device: what flows into it may be kept from round to round; "
            "-1: below the lowest that learns here",
            at_least=-1,
            at_most=COUNT_MAX,
        ),
    ] = -1
    frozen: Annotated[
        Word,
        Option(
            "part of the adapter that is not trained, the A of every LoRA pair; none without it",
            choices=("", LORA_A),
        ),
    ] = ""
    rank: Annotated[
        int,
        Option(
            "train the first so many components of every LoRA pair; 0 for all", at_least=0, at_most=COUNT_MAX
        ),
    ] = 0
    rows: Annotated[
        int,
        Option(
            "so many components of every LoRA pair learn and travel in a round, drawn anew for each; 0 for all",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    rows_seed: Annotated[
        int,
        Option(
            "seed that they are drawn by: all devices of a round have the same",
            at_least=0,
            below=SEED_MAX + 1,
        ),
    ] = 0
    mask: Annotated[
        Word,
        Option(
            "what travels of an update: all, the elements of a mask that the devices agree on by vote, thresholds of rank "
            "components alone, or nothing; with the last two every parameter stays on its device",
            choices=("", *MASKS),
        ),
    ] = ""
    personal: Annotated[
        int,
        Option(
            "layers whose adapters each device keeps to itself, chosen anew in each round; 0 for none",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    personal_by: Annotated[Word, Option("which layers stay personal", table="ranking of layers")] = (
        "importance"
    )
    sums_bits: Annotated[
        int,
        Option(
            "bits of the significand of a class sum that is sent up; 0 for all of float32's",
            at_least=0,
            at_most=23,
        ),
    ] = 0
    histogram: Annotated[
        bool,
        Option(
            "ask each device once how many of its samples are of which class; only one with --tell-labels says so",
        ),
    ] = False
    micro_tokens: Annotated[
        int,
        Option(
            "gradient accumulation: rows times tokens of a batch that run at a time, padding included, at least one row: less "
            "memory, the same gradients; 0 for no bound",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    most_norm: Annotated[
        float,
        Option("L2 norm of an update's whole change, which is scaled down to it; 0 for any", at_least=0),
    ] = 0.0
    noise: Annotated[
        float,
        Option(
            "normal noise that the device adds to each element of its change, by its standard deviation in most_norm; then "
            "no figures come with the update; 0 for none",
            at_least=0,
        ),
    ] = 0.0
    sample_clip: Annotated[
        float,
        Option(
            "DP-SGD: L2 norm of one sample's gradient, which is scaled down to it; 0 for ordinary steps",
            at_least=0,
            at_most=SAMPLE_NOISE_MAX,
        ),
    ] = 0.0
    sample_noise: Annotated[
        float,
        Option(
            "DP-SGD: standard deviation of the noise on the sum of a step's gradients, in sample_clip",
            at_least=0,
            at_most=SAMPLE_NOISE_MAX,
        ),
    ] = 0.0
    sample_rate: Annotated[
        float,
        Option(
            "DP-SGD: chance of each sample to be in a step, in place of batch_size", at_least=0, at_most=1
        ),
    ] = 0.0
    class_weights: Annotated[
        ClassWeights,
        Option("weights of the classes in the training loss: balanced, or a=2,b=1, 1 for the others"),
    ] = ""

    @property
    def hides_samples(self) -> bool:
        """Whether its steps are those of DP-SGD."""
        return self.sample_clip > 0


class SumGrid(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The public grid of updates that are summed as whole numbers; blank of all others."""

    bits: Annotated[int, Meta(ge=0, le=24)] = 0
    """Of an element's change, its sign included; 0: there is no grid."""
    weight_bits: Annotated[int, Meta(ge=0, le=20)] = 0
    """Of a device's weight, its samples; more samples count as 2**weight_bits - 1. 0: every device counts the same."""
    summands: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """Devices that are summed at most."""
    limit: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Largest magnitude of an element's change; a larger one is cut."""
