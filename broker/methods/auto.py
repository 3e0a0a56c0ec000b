"""``--policy auto``: a bandit chooses every device's layer policy, round by round, from what it has gained in which time.

DropPEFT (arXiv 2503.10217) has an online configurator that explores and exploits, per device. As remembered, not confirmed
(``papers.md`` 1.4, [MEM]): its reward is the accuracy gained per second, and a sliding window forgets. All the rest is ours:

- **Reward** is the loss taken off the device's own held-out part, divided by the longer of the round's seconds and the *pace*: the median of
  what the other devices' work takes. A round waits for its devices, so to be faster than the others is worth nothing: a fast device is
  asked for what gains most, a slow one for what gains most in its time. Loss, because the accuracy of twenty rows is too coarse.
- **Gains** are those of ``bandit.effects``; a device's own count with the fleet's as ``pseudo`` trials.
- **Warm-up**: the fleet tries each arm once, different devices different ones. Then ``epsilon`` (explores by chance, less from round to
  round) or ``ucb`` (adds to an arm's gain what its trials leave open).
- **Guards.** An arm that gains quickly at first, as a head does, may have nothing left to gain later. So an arm must also gain at least a
  share of what the best arm gains, which grows from 0 to all but ``tolerance``, unless noise could be why it does not. In the last ``tail``
  of the rounds nothing is explored, and an arm must be shown to gain no less than full depth does, by ``tolerance``; where that is
  not shown a device trains at full depth. What a device trains on to no end is measured locally: what the other devices' layers lose
  when they are averaged it cannot see.
- **Feasible** is what a device has not declined; if it declined for memory, also nothing that needs as much. A device behind the pace gets no arm
  that takes longer than full depth does, on itself or on the slowest device.
- **Arms** one layer deeper and less deep than the favourite join when that has been the favourite for a while; the worst that was tried
  enough goes where there are too many.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, log, nan, sqrt
from statistics import median
from typing import NamedTuple

import msgspec

from fleetune.broker.job import Settings, device_work
from fleetune.broker.methods.arms import (
    FULL_DEPTH,
    Arm,
    arm_of,
    first_arms,
    needs_as_much,
    neighbours,
    units,
)
from fleetune.broker.methods.bandit import (
    NOTHING,
    Effects,
    Estimate,
    Trial,
    cost_ratio,
    effects,
    gain_of,
    median_without,
    seconds_of,
)
from fleetune.broker.methods.choosing import Candidate, Choice, Configurator
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.wire import PolicySpec
from fleetune.device_runtime.draws import Key, permutation, uniforms
from fleetune.device_runtime.errors import ConfigError

_GAIN_LEAST = 1e-6
"""Arms that gain less, or lose, are told apart by their time alone."""


class Tuning(NamedTuple):
    """The numbers of the bandit, all ours."""

    window: int = 8
    """Rounds that count."""
    own_trials: int = 12
    """Of a device, of any age: its times are taken from these."""
    epsilon: float = 0.2
    epsilon_decay: float = 0.95
    """From round to round."""
    optimism: float = 0.5
    """Of ``ucb``: standard deviations that an untried arm may be better than it looks."""
    pseudo: float = 4.0
    tail: float = 0.35
    """Share of the rounds, the last ones, in which nothing is tried out."""
    ripe: float = 0.35
    """Share of the rounds after which an arm must gain all but ``tolerance`` of what the best one gains; less before."""
    tolerance: float = 0.1
    """Share of the best gain that an arm may lack."""
    trials_least: int = 4
    """Before an arm is judged."""
    arms_max: int = 8
    steady_rounds: int = 3
    """For which an arm must be the favourite before its neighbours join."""


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
    refused: dict[str, list[tuple[Arm, str]]] = field(default_factory=dict)
    """By device: arms declined, and the cause."""
    favourite: tuple[PolicySpec, int] = (FULL_DEPTH, 0)
    """And for how many rounds it has been that."""
    summary: "Summary | None" = None
    """Of all this; None if something was learned since."""


class Summary(NamedTuple):
    """What the trials come to."""

    effects: Effects
    ratio: float
    """Of the way back's cost to the way there's."""
    unit_s: Mapping[str, float]
    """Seconds per unit of cost and round, by device."""
    paces: Sequence[float]
    """What the devices' newest work took, sorted."""
    fleet_unit_s: float
    slowest_full_s: float
    """Full depth on the slowest device."""


def auto(tuning: Tuning = Tuning()) -> Configurator:
    """Choose by what was gained; see the module's text."""
    return Configurator(lambda settings: _begun(settings, tuning), choose, learn)


def choose(memory: Memory, candidate: Candidate) -> Choice:
    """Choose a device's arm; a choice without work if it has declined all that there are."""
    feasible = _feasible(memory, candidate.device_id)
    if not feasible:
        return Choice(None, _refusal(memory, candidate.device_id))
    arm, reason = _picked(memory, candidate, feasible)
    work = device_work(memory.settings, round_number=candidate.round, position=candidate.position)
    return Choice(msgspec.structs.replace(work, policy=arm.policy), reason)


def learn(memory: Memory, outcome: Outcome) -> Memory:
    """Take in what came of a task; what it says that is nonsense is left out."""
    device, policy, number = outcome.device_id, outcome.work.policy, outcome.work.rounds_before + 1
    if number > memory.round:
        _evolve(memory, number)
    memory.summary = None
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
            ),
        )
    elif outcome.declined:
        arm = _known(memory, policy)
        memory.refused.setdefault(device, []).append((arm, outcome.declined))
    return memory


def _begun(settings: Settings, tuning: Tuning) -> Memory:
    arms = {arm.policy: arm for arm in first_arms(settings)}
    return Memory(settings, tuning, arms, dict(arms))


def _feasible(memory: Memory, device: str) -> list[Arm]:
    refused = memory.refused.get(device, [])
    return [arm for arm in memory.arms.values() if not any(_rules_out(arm, *one) for one in refused)]


def _rules_out(arm: Arm, declined: Arm, cause: str) -> bool:
    return arm.policy == declined.policy or (cause == "memory" and needs_as_much(arm, declined))


def _refusal(memory: Memory, device: str) -> str:
    least = min((arm for arm, _ in memory.refused[device]), key=lambda arm: arm.deepest)
    return f"it declined every arm, {least.name} the least of them"


def _picked(memory: Memory, candidate: Candidate, feasible: Sequence[Arm]) -> tuple[Arm, str]:
    """The arm, and why."""
    if is_tail(memory, candidate.round):
        return _settled(memory, candidate.device_id, feasible)
    untried = [arm for arm in _in_warm_up_order(memory) if arm.policy not in memory.tried and arm in feasible]
    if untried and (candidate.position < len(untried) or not memory.trials):
        return untried[candidate.position % len(untried)], "warm-up: the fleet has not tried it"
    allowed = [arm for arm in feasible if _gains_enough(memory, arm, candidate.round)]
    allowed = [arm for arm in allowed if _keeps_pace(memory, arm, candidate.device_id)] or list(feasible[:1])
    lot, place = uniforms(Key(memory.settings.seed, "configurator", candidate.round, candidate.position), 2)
    if memory.settings.explore == "epsilon" and lot < _epsilon(memory, candidate.round):
        return allowed[int(place * len(allowed))], "explores"
    return _best(memory, candidate.device_id, allowed, feasible)


def is_tail(memory: Memory, number: int) -> bool:
    """Whether a round is of the last ones, in which nothing is tried out."""
    return number > (1 - memory.tuning.tail) * memory.settings.rounds


def _in_warm_up_order(memory: Memory) -> list[Arm]:
    arms = list(memory.arms.values())
    order = permutation(Key(memory.settings.seed, "configurator", 0), len(arms))
    return [arms[i] for i in order.tolist()]


def _epsilon(memory: Memory, number: int) -> float:
    chance = memory.tuning.epsilon
    for _ in range(number - 1):
        chance = chance * memory.tuning.epsilon_decay
    return chance


def _best(memory: Memory, device: str, allowed: Sequence[Arm], feasible: Sequence[Arm]) -> tuple[Arm, str]:
    """The arm of the highest reward; full depth, or what is nearest, while nothing was measured."""
    found = _summary(memory)
    if not found.effects.arms:
        return feasible[0], "nothing was measured yet: the deepest that it can"
    is_optimistic = memory.settings.explore == "ucb" and not is_tail(memory, memory.round + 1)
    pace = _pace(memory, device)

    def reward(arm: Arm) -> float:
        gain = _gain(memory, device, arm) + (_bonus(memory, device, arm) if is_optimistic else 0.0)
        return max(gain, _GAIN_LEAST) / max(_seconds(memory, device, arm), pace, _GAIN_LEAST)

    best = max(allowed, key=reward)
    return best, _told(memory, device, best, pace)


def _told(memory: Memory, device: str, arm: Arm, pace: float) -> str:
    gain, seconds = _gain(memory, device, arm), _seconds(memory, device, arm)
    full = memory.arms[FULL_DEPTH]
    beside = f"; full {_gain(memory, device, full):.3g} in {_seconds(memory, device, full):.3g} s"
    return f"most for its time: gains {gain:.3g} in {seconds:.3g} s, pace {pace:.3g} s" + beside * (
        arm != full
    )


def _settled(memory: Memory, device: str, feasible: Sequence[Arm]) -> tuple[Arm, str]:
    """Of the arms that are shown to gain as much as full depth, the one of the highest reward."""
    shown = [arm for arm in feasible if arm.policy == FULL_DEPTH or _is_as_good(memory, arm)]
    allowed = [arm for arm in shown if _keeps_pace(memory, arm, device)]
    if not allowed:
        return feasible[0], "last rounds: the deepest that it can"
    if [arm.policy for arm in allowed] == [FULL_DEPTH]:
        return allowed[0], "last rounds: no other is shown to gain as much"
    arm, reason = _best(memory, device, allowed, feasible)
    return arm, f"last rounds, {reason}"


def _gains_enough(memory: Memory, arm: Arm, number: int) -> bool:
    """Whether an arm gains the share of the best arm's that is asked for by now, or noise could be why it does not."""
    found = _summary(memory).effects
    mine, best = found.arms.get(arm.policy), _leading(memory)
    if (
        arm.policy == FULL_DEPTH
        or mine is None
        or best is None
        or mine.num_trials < memory.tuning.trials_least
    ):
        return True
    progress = number / max(1.0, memory.tuning.ripe * memory.settings.rounds)
    asked = (1 - memory.tuning.tolerance) * min(1.0, progress) * (found.level + best.mean)
    return found.level + mine.mean + _error(mine, best) >= asked


def _is_as_good(memory: Memory, arm: Arm) -> bool:
    """Whether an arm is shown to gain no less than the best and than full depth, but for the tolerance."""
    found = _summary(memory).effects
    mine, best, full = found.arms.get(arm.policy), _leading(memory), found.arms.get(FULL_DEPTH)
    if (
        mine is None
        or best is None
        or full is None
        or min(mine.num_trials, full.num_trials) < memory.tuning.trials_least
    ):
        return False
    slack = memory.tuning.tolerance * max(found.level + full.mean, 0.0)
    return (
        mine.mean - _error(mine, full) >= full.mean - slack
        and mine.mean + _error(mine, best) >= best.mean - slack
    )


def _error(one: Estimate, other: Estimate) -> float:
    """Standard error of a difference."""
    return sqrt(one.error * one.error + other.error * other.error)


def _leading(memory: Memory) -> Estimate | None:
    """The best arm's gain of those tried enough, by what is sure of it."""
    found = _summary(memory).effects.arms
    judged = [
        found[p] for p in memory.arms if p in found and found[p].num_trials >= memory.tuning.trials_least
    ]
    return max(judged, key=lambda one: one.mean - one.error, default=None)


def _keeps_pace(memory: Memory, arm: Arm, device: str) -> bool:
    """Whether a device is ahead of the others, or would not be longer at this than at full depth, nor the slowest device."""
    seconds, full = _seconds(memory, device, arm), memory.arms[FULL_DEPTH]
    if arm == full or seconds <= _pace(memory, device):
        return True
    return seconds <= min(_seconds(memory, device, full), _summary(memory).slowest_full_s)


def _gain(memory: Memory, device: str, arm: Arm) -> float:
    """Gain to be expected: the device's own trials, and as many of the fleet as ``pseudo`` says."""
    found = _summary(memory).effects
    fleet = found.arms[arm.policy].mean if arm.policy in found.arms else 0.0
    total, count = found.residuals.get((device, arm.policy), (0.0, 0))
    pseudo = memory.tuning.pseudo
    return found.level + (total + pseudo * fleet) / (count + pseudo)


def _bonus(memory: Memory, device: str, arm: Arm) -> float:
    found = _summary(memory).effects
    mine = sum(n for (who, _), (_, n) in found.residuals.items() if who == device)
    _, count = found.residuals.get((device, arm.policy), (0.0, 0))
    return memory.tuning.optimism * found.spread * sqrt(log(2 + mine) / (1 + count))


def _seconds(memory: Memory, device: str, arm: Arm) -> float:
    """Seconds of a round to be expected: as the device was at this arm, or from its time per unit of cost; 0 if nothing is known."""
    found = _summary(memory)
    own = [t.seconds for t in memory.own.get(device, ()) if t.arm == arm.policy and isfinite(t.seconds)]
    return median(own) if own else found.unit_s.get(device, found.fleet_unit_s) * units(arm, found.ratio)


def _pace(memory: Memory, device: str) -> float:
    """What the other devices' work takes; 0 if nothing is known."""
    mine = _newest_s(memory.own.get(device, ()))
    return median_without(_summary(memory).paces, mine)


def _newest_s(trials: Sequence[Trial]) -> float:
    return next((t.seconds for t in reversed(trials) if isfinite(t.seconds)), nan)


def _summary(memory: Memory) -> Summary:
    memory.summary = memory.summary or _summed(memory)
    return memory.summary


def _summed(memory: Memory) -> Summary:
    recent = {trial.device_id for trial in memory.trials}
    own = {device: list(memory.own[device]) for device in sorted(recent)}
    ratio = cost_ratio(own, memory.known)
    unit_s = {
        device: found for device, trials in own.items() if isfinite(found := _unit_s(memory, trials, ratio))
    }
    full = units(memory.arms[FULL_DEPTH], ratio)
    newest = (_newest_s(trials) for trials in own.values())
    return Summary(
        effects(memory.trials) if memory.trials else NOTHING,
        ratio,
        unit_s,
        sorted(seconds for seconds in newest if isfinite(seconds)),
        median(unit_s.values()) if unit_s else 0.0,
        max(unit_s.values(), default=0.0) * full,
    )


def _unit_s(memory: Memory, trials: Sequence[Trial], ratio: float) -> float:
    found = [t.seconds / units(memory.known[t.arm], ratio) for t in trials if isfinite(t.seconds)]
    return median(found) if found else nan


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
    found = _summary(memory).effects
    mine = found.arms.get(arm.policy)
    if mine is None or mine.num_trials < memory.tuning.trials_least:
        return 0.0
    return max(found.level + mine.mean, 0.0) / units(arm, _summary(memory).ratio)


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
    found = _summary(memory).effects.arms
    judged = [
        arm
        for policy, arm in memory.arms.items()
        if policy not in stays and policy in found and found[policy].num_trials >= memory.tuning.trials_least
    ]
    if judged:
        del memory.arms[min(judged, key=lambda arm: _worth(memory, arm)).policy]
    return bool(judged)
