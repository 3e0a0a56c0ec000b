"""What a bandit remembers of a job, and how it goes on: trials of the last rounds, what was declined, and the arms of today."""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from typing import NamedTuple

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.arms import (
    FULL_DEPTH,
    Arm,
    arm_of,
    first_arms,
    neighbours,
    units,
)
from fleetune.broker.methods.bandit import (
    NOTHING,
    Effects,
    Trial,
    batch_s,
    effects,
    gain_of,
    seconds_of,
)
from fleetune.broker.methods.paces import Paces, Timed, paces
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.work import ADAPTER, PolicySpec
from fleetune.device_runtime.errors import ConfigError

WAY_BACK = 1.5
"""What a layer's way back costs in ways there, until times say otherwise: with LoRA no gradients of the frozen matrices."""
_PASS = "pass for the head"


class Tuning(NamedTuple):
    """The numbers of the bandit, all ours."""

    window: int = 8
    """Rounds that count."""
    own_trials: int = 12
    """Of a device, of any age: its times are taken from these."""
    epsilon: float = 0.1
    epsilon_decay: float = 0.95
    """From round to round."""
    optimism: float = 0.5
    """Of ``ucb``: standard deviations that an untried arm may be better than it looks."""
    pseudo: float = 4.0
    least: int = 200
    """Device-rounds of a job without which nothing is tried out: the gains of twenty samples each would not tell arms apart."""
    tail: float = 0.3
    """Share of the rounds, the last ones, in which nothing is tried out."""
    patience: float = 1.0
    """A device trains as deep as it can in so many times what the middle one takes for as many layers as may learn."""
    shallow: float = 0.5
    """Share of the layers that stay frozen on every device while the upper ones gain enough: what flows out of them is kept."""
    stages: tuple[tuple[float, float], ...] = ((0.2, 0.75),)
    """Until which share of the rounds which share of the layers, the lower ones, stays frozen on every device."""
    hurry: float = 0.8
    """``patience`` of a job below ``least`` between its stages and its tail: more rounds, of less depth on slower devices."""
    pilots_least: int = 12
    """Trials of full depth without which nothing is shown to gain as much."""
    trial: int = 4
    """Every so many rounds some devices train the upper layers alone, so that it is known what these would gain."""
    pilot: int = 8
    """Every so many rounds some devices train all layers, so that it is known what the frozen ones would gain."""
    ripe: float = 0.35
    """Share of the rounds after which an arm must gain all but ``tolerance`` of what the best one gains; less before."""
    tolerance: float = 0.1
    """Share of the best gain that an arm may lack."""
    trials_least: int = 6
    """Before an arm is judged."""
    sure: float = 2.0
    """Standard errors that an arm must stand above what is asked of it, to be preferred to a deeper one."""
    arms_max: int = 8
    steady_rounds: int = 3
    """For which an arm must be the favourite before its neighbours join."""


class Summary(NamedTuple):
    """What the trials come to."""

    effects: Effects
    paces: Paces
    newest_s: Sequence[float]
    """What the devices' newest work took, sorted."""


@dataclass
class Memory:
    """What is learned so far. ``arms`` are those to choose from by policy, full depth first; ``known`` those ever chosen too."""

    settings: Settings
    tuning: Tuning
    arms: dict[PolicySpec, Arm]
    known: dict[PolicySpec, Arm]
    round: int = 0
    tried: set[PolicySpec] = field(default_factory=set)
    trials: deque[Trial] = field(default_factory=deque)
    own: dict[str, deque[Trial]] = field(default_factory=dict)
    pass_s: dict[str, float] = field(default_factory=dict)
    """By device: seconds of a batch in the round for the head; how much slower than another it is."""
    refused: dict[str, list[tuple[Arm, str]]] = field(default_factory=dict)
    """By device: arms declined, and the cause."""
    favourite: tuple[PolicySpec, int] = (FULL_DEPTH, 0)
    """And for how many rounds it has been that."""
    is_shallow: bool = False
    """Whether the lower layers stay frozen on every device for now."""
    summary: Summary | None = None
    """Of all this; None if something was learned since."""


def begun(settings: Settings, tuning: Tuning) -> Memory:
    """Begin with the job's first arms."""
    arms = {arm.policy: arm for arm in first_arms(settings)}
    return Memory(settings, tuning, arms, dict(arms))


def learn(memory: Memory, outcome: Outcome) -> Memory:
    """Take in what came of a task; what it says that is nonsense is left out."""
    device, policy, number = outcome.device_id, outcome.work.policy, outcome.work.rounds_before + 1
    if outcome.work.learns != ADAPTER:
        memory.summary = None
        memory.pass_s |= (
            {device: found} if isfinite(found := batch_s(outcome.stats, outcome.work.batch_size)) else {}
        )
        return memory
    if number > memory.round:
        _evolve(memory, number)
    memory.summary = None
    if outcome.declined != "":
        memory.tried.add(policy)
    if outcome.declined is None:
        _try(
            memory,
            Trial(
                device,
                policy,
                number,
                gain_of(outcome.stats),
                seconds_of(outcome.stats),
                outcome.stats.get("held_loss_before", nan),
                max(outcome.work.cache_below, 0),
            ),
        )
    elif outcome.declined:
        arm = _known(memory, policy)
        memory.refused.setdefault(device, []).append((arm, outcome.declined))
    return memory


def is_long(memory: Memory) -> bool:
    """Whether there is time enough in the job to try arms and to gain by what they show."""
    return memory.settings.rounds * memory.settings.clients >= memory.tuning.least


def is_tail(memory: Memory, number: int) -> bool:
    """Whether a round is of the last ones, in which nothing is tried out."""
    return number > (1 - memory.tuning.tail) * memory.settings.rounds


def summary_of(memory: Memory) -> Summary:
    """What is known by now, worked out once after each outcome."""
    memory.summary = memory.summary or _summed(memory)
    return memory.summary


def newest_s(trials: Sequence[Trial]) -> float:
    """Seconds of the newest of a device's trials that tells them; NaN if none does."""
    return next((t.seconds for t in reversed(trials) if isfinite(t.seconds)), nan)


def _evolve(memory: Memory, number: int) -> None:
    """A round begins to tell: forget the oldest one, and change the arms if one has been the favourite long enough."""
    if memory.trials:
        _prefer(memory)
        if memory.favourite[1] >= memory.tuning.steady_rounds and not is_tail(memory, number):
            _spread_out(memory)
    memory.round, memory.summary = number, None
    while memory.trials and memory.trials[0].round <= number - memory.tuning.window:
        memory.trials.popleft()


def _prefer(memory: Memory) -> None:
    """Note the arm that gains most for its cost."""
    best = max(memory.arms.values(), key=lambda arm: _worth(memory, arm))
    before, rounds = memory.favourite
    memory.favourite = (best.policy, rounds + 1 if best.policy == before else 1)


def _worth(memory: Memory, arm: Arm) -> float:
    """Gain for its cost, in the fleet; nothing unless it was tried enough."""
    found = summary_of(memory).effects
    mine = found.arms.get(arm.policy)
    if mine is None or mine.num_trials < memory.tuning.trials_least:
        return 0.0
    return max(found.level + mine.mean, 0.0) / cost_of(memory, arm)


def _spread_out(memory: Memory) -> None:
    """Let the favourite's neighbours join, and the worst go."""
    favourite = memory.arms[memory.favourite[0]]
    for arm in neighbours(favourite, memory.settings.num_layers):
        if any(_is_near(arm, other) for other in memory.known.values()):
            continue
        if len(memory.arms) >= memory.tuning.arms_max and not _retire_worst(memory):
            return
        memory.arms[arm.policy] = memory.known[arm.policy] = arm


def _is_near(arm: Arm, other: Arm) -> bool:
    """Whether two arms are the same but for rounding."""
    return arm.policy.name == other.policy.name and arm[1:] == other[1:]


def _retire_worst(memory: Memory) -> bool:
    """Take the arm of the least worth away, if one was tried enough; full depth, the job's own and the favourite stay."""
    stays = {FULL_DEPTH, memory.settings.work.policy, memory.favourite[0]}
    found = summary_of(memory).effects.arms
    judged = [
        arm
        for policy, arm in memory.arms.items()
        if policy not in stays and policy in found and found[policy].num_trials >= memory.tuning.trials_least
    ]
    if judged:
        del memory.arms[min(judged, key=lambda arm: _worth(memory, arm)).policy]
    return bool(judged)


def _try(memory: Memory, trial: Trial) -> None:
    _known(memory, trial.arm)
    memory.trials.append(trial)
    memory.own.setdefault(trial.device_id, deque(maxlen=memory.tuning.own_trials)).append(trial)


def _known(memory: Memory, policy: PolicySpec) -> Arm:
    """The arm of a policy, be it one of today's or not: of a policy that cannot be planned here, as full depth."""
    if policy not in memory.known:
        try:
            memory.known[policy] = arm_of(policy, max(memory.settings.num_layers, 1))
        except ConfigError:
            memory.known[policy] = memory.arms[FULL_DEPTH]._replace(policy=policy)
    return memory.known[policy]


def timed_as(policy: PolicySpec, below: int) -> Hashable:
    """What the seconds of a policy are kept under: a hidden cache makes another arm of it."""
    return policy, below


def cost_before(arm: Arm, below: int) -> float:
    """What an arm costs as long as nobody has tried it, in layers run forward."""
    return units(arm, WAY_BACK, below=below)


def cost_of(memory: Memory, arm: Arm, below: int = 0) -> float:
    """What an arm costs beside others, as far as is known."""
    return summary_of(memory).paces.cost(timed_as(arm.policy, below), cost_before(arm, below))


def _summed(memory: Memory) -> Summary:
    own = [trial for device in sorted(memory.own) for trial in memory.own[device]]
    newest = (newest_s(trials) for trials in memory.own.values())
    return Summary(
        effects(memory.trials) if memory.trials else NOTHING,
        _paces(memory, own),
        sorted(seconds for seconds in newest if isfinite(seconds)),
    )


def _paces(memory: Memory, own: Sequence[Trial]) -> Paces:
    trained = [Timed(t.device_id, timed_as(t.arm, t.below), t.seconds) for t in own]
    passes = [Timed(device, _PASS, seconds) for device, seconds in memory.pass_s.items()]
    priors = {timed_as(t.arm, t.below): cost_before(memory.known[t.arm], t.below) for t in own}
    return paces([*trained, *passes], {**priors, _PASS: 0.0})
