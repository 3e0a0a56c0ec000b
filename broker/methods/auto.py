"""``--policy auto``: a bandit chooses every device's layer policy, round by round, from what it has gained in which time.

DropPEFT (arXiv 2503.10217) has an online configurator that explores and exploits, per device. As remembered, not confirmed
(``papers.md`` 1.4, [MEM]): its reward is the accuracy gained per second, and a sliding window forgets. All the rest is ours.

- **Reward**: the loss taken off the device's own held-out part, divided by the longer of the round's seconds and the *pace*, the
  median of what the other devices' work takes. A round waits for its devices, so to be faster than the others is worth nothing: a
  fast device is asked for what gains most, a slow one for what gains most in its time. Loss, because the accuracy of twenty rows
  is too coarse.
- **Gains** are those of ``bandit.effects``, as far as they last until the next round; a device's own count with ``pseudo`` trials
  of the fleet.
- **Warm-up**: the fleet tries each arm once, different devices different ones. Then ``epsilon`` (explores by chance, less from
  round to round) or ``ucb`` (adds to an arm's gain what its trials leave open).
- **Guards.** An arm that gains quickly at first, as a head does, may have nothing left to gain later. So an arm must also gain a
  share of what the best one gains, growing from 0 to all but ``tolerance``, unless noise could be why it does not. In the last
  ``tail`` of the rounds nothing is explored, and an arm must be shown to gain no less than full depth does, by ``tolerance``;
  where that is not shown a device trains at full depth.
- **Feasible** is what a device has not declined; if it declined for memory, also nothing that needs as much. A device behind the
  pace gets no arm that takes longer than full depth does, on itself or on the slowest device.
- **Frozen below**: while the arms that train only the upper half gain enough, no device trains a layer below it, so that
  every device's hidden cache holds from round to round. Every few rounds is a *pilot*: some of the quicker devices train all
  layers, and what that gains decides. In the last rounds all layers learn again, on a device as many as it has time for in
  ``patience`` times what the middle one takes for all of them, unless the upper half is shown to gain as much.
- **Arms** one layer deeper and less deep than the favourite join when it has been the favourite for a while; the worst that was
  tried enough goes where there are too many.
"""

from collections.abc import Sequence

import msgspec

from fleetune.broker.job import device_work
from fleetune.broker.methods.arms import FULL_DEPTH, Arm, needs_as_much
from fleetune.broker.methods.bandit_memory import Memory, Tuning, begun, is_tail, learn, summary_of
from fleetune.broker.methods.choosing import Candidate, Choice, Configurator
from fleetune.broker.methods.outlook import (
    bonus,
    error_of,
    gain_at,
    leading,
    median_full_s,
    pace_of,
    seconds_at,
)
from fleetune.device_runtime.draws import Key, permutation, uniforms

TUNING = Tuning()
_GAIN_LEAST = 1e-6
"""Arms that gain less, or lose, are told apart by their time alone."""


def auto(tuning: Tuning = TUNING) -> Configurator:
    """Choose by what was gained; see the module's text."""
    return Configurator(lambda settings: begun(settings, tuning), choose, learn)


def choose(memory: Memory, candidate: Candidate) -> Choice:
    """Choose a device's arm; a choice without work if it has declined all that there are."""
    feasible = _feasible(memory, candidate.device_id)
    if not feasible:
        return Choice(None, _refusal(memory, candidate.device_id))
    below = floor_of(memory, candidate.round)
    above = [arm for arm in feasible if arm.lowest >= below]
    below = below if above else 0
    arm, reason = _picked(memory, candidate, above or feasible, below)
    work = device_work(memory.settings, round_number=candidate.round, position=candidate.position)
    return Choice(msgspec.structs.replace(work, policy=arm.policy, cache_below=below or -1), reason)


def _feasible(memory: Memory, device: str) -> list[Arm]:
    refused = memory.refused.get(device, [])
    return [arm for arm in memory.arms.values() if not any(_rules_out(arm, *one) for one in refused)]


def _rules_out(arm: Arm, declined: Arm, cause: str) -> bool:
    return arm.policy == declined.policy or (cause == "memory" and needs_as_much(arm, declined))


def _refusal(memory: Memory, device: str) -> str:
    least = min((arm for arm, _ in memory.refused[device]), key=lambda arm: arm.deepest)
    return f"it declined every arm, {least.name} the least of them"


def _picked(memory: Memory, candidate: Candidate, feasible: Sequence[Arm], below: int) -> tuple[Arm, str]:
    """The arm, and why; no layer beneath ``below`` learns in this round."""
    device = candidate.device_id
    if is_tail(memory, candidate.round):
        return _settled(memory, device, feasible, below)
    if is_pilot(memory, candidate.round) and candidate.position % 2 == 0 and _is_quick(memory, device):
        return feasible[0], "pilot: what would all layers gain?"
    untried = [arm for arm in _in_warm_up_order(memory) if arm.policy not in memory.tried and arm in feasible]
    if untried and (candidate.position < len(untried) or not memory.trials):
        return untried[candidate.position % len(untried)], "warm-up: the fleet has not tried it"
    allowed = [arm for arm in feasible if _gains_enough(memory, arm, candidate.round)]
    allowed = [arm for arm in allowed if _keeps_pace(memory, arm, device, below)] or list(feasible[:1])
    lot, place = uniforms(Key(memory.settings.seed, "configurator", candidate.round, candidate.position), 2)
    if memory.settings.explore == "epsilon" and lot < _epsilon(memory, candidate.round):
        return allowed[int(place * len(allowed))], "explores"
    return _best(memory, device, allowed, feasible, below)


def _in_warm_up_order(memory: Memory) -> list[Arm]:
    arms = list(memory.arms.values())
    order = permutation(Key(memory.settings.seed, "configurator", 0), len(arms))
    return [arms[i] for i in order.tolist()]


def _epsilon(memory: Memory, number: int) -> float:
    chance = memory.tuning.epsilon
    for _ in range(number - 1):
        chance = chance * memory.tuning.epsilon_decay
    return chance


def _best(
    memory: Memory, device: str, allowed: Sequence[Arm], feasible: Sequence[Arm], below: int
) -> tuple[Arm, str]:
    """The arm of the highest reward; full depth, or what is nearest, while nothing was measured."""
    found = summary_of(memory)
    if not found.effects.arms:
        return feasible[0], "nothing was measured yet: the deepest that it can"
    is_optimistic = memory.settings.explore == "ucb" and not is_tail(memory, memory.round + 1)
    pace = pace_of(memory, device)

    def reward(arm: Arm) -> float:
        gain = gain_at(memory, device, arm) + (bonus(memory, device, arm) if is_optimistic else 0.0)
        return max(gain, _GAIN_LEAST) / max(seconds_at(memory, device, arm, below=below), pace, _GAIN_LEAST)

    best = max(allowed, key=reward)
    return best, _told(memory, device, best, pace, below)


def _told(memory: Memory, device: str, arm: Arm, pace: float, below: int) -> str:
    gain, seconds = gain_at(memory, device, arm), seconds_at(memory, device, arm, below=below)
    full = memory.arms[FULL_DEPTH]
    beside = f"; full {gain_at(memory, device, full):.3g} in {seconds_at(memory, device, full):.3g} s"
    return f"most for its time: gains {gain:.3g} in {seconds:.3g} s, pace {pace:.3g} s" + beside * (
        arm != full
    )


def _settled(memory: Memory, device: str, feasible: Sequence[Arm], below: int) -> tuple[Arm, str]:
    """Of the arms that are shown to gain as much as full depth, the one of the highest reward; else the deepest in time."""
    shown = [arm for arm in feasible if arm.policy == FULL_DEPTH or _is_as_good(memory, arm)]
    allowed = [arm for arm in shown if _keeps_pace(memory, arm, device, below)]
    if any(arm.policy != FULL_DEPTH for arm in allowed):
        arm, reason = _best(memory, device, allowed, feasible, below)
        return arm, f"last rounds, {reason}"
    limit = memory.tuning.patience * median_full_s(memory)
    in_time = [arm for arm in feasible if seconds_at(memory, device, arm, below=below) <= limit]
    arm = max(in_time or feasible[-1:], key=lambda arm: arm.back) if limit else feasible[0]
    return arm, "last rounds: the deepest in the time that full depth takes in the middle of the fleet"


def floor_of(memory: Memory, number: int) -> int:
    """The lowest layer that any device trains in a round, so that what flows into it can be kept."""
    num_layers = memory.settings.num_layers
    floor = int(memory.tuning.shallow * num_layers)
    above = [arm for arm in memory.arms.values() if arm.lowest >= floor]
    if not floor or not above or is_pilot(memory, number):
        return 0
    deepest = max(above, key=lambda arm: arm.back)
    if is_tail(memory, number):
        return floor if _is_as_good(memory, deepest) else 0
    return floor if _gains_enough(memory, deepest, number) else 0


def is_pilot(memory: Memory, number: int) -> bool:
    """Whether some devices train all layers in a round, whatever seems best."""
    return number % memory.tuning.pilot == 0 and not is_tail(memory, number)


def _is_quick(memory: Memory, device: str) -> bool:
    """Whether a device trains all layers no more slowly than the middle one does; yes where nothing is known."""
    return seconds_at(memory, device, memory.arms[FULL_DEPTH]) <= median_full_s(memory)


def _gains_enough(memory: Memory, arm: Arm, number: int) -> bool:
    """Whether an arm gains the share of the best arm's that is asked for by now, or noise could be why it does not."""
    found = summary_of(memory).effects
    mine, best = found.arms.get(arm.policy), leading(memory)
    if (
        arm.policy == FULL_DEPTH
        or mine is None
        or best is None
        or mine.num_trials < memory.tuning.trials_least
    ):
        return True
    progress = number / max(1.0, memory.tuning.ripe * memory.settings.rounds)
    asked = (1 - memory.tuning.tolerance) * min(1.0, progress) * (found.level + best.mean)
    return found.level + mine.mean + error_of(mine, best) >= asked


def _is_as_good(memory: Memory, arm: Arm) -> bool:
    """Whether an arm is shown to gain no less than the best and than full depth, but for the tolerance."""
    found = summary_of(memory).effects
    mine, best, full = found.arms.get(arm.policy), leading(memory), found.arms.get(FULL_DEPTH)
    if (
        mine is None
        or best is None
        or full is None
        or mine.num_trials < memory.tuning.trials_least
        or full.num_trials < memory.tuning.pilots_least
    ):
        return False
    slack = memory.tuning.tolerance * max(found.level + full.mean, 0.0)
    return (
        mine.mean - error_of(mine, full) >= full.mean - slack
        and mine.mean + error_of(mine, best) >= best.mean - slack
    )


def _keeps_pace(memory: Memory, arm: Arm, device: str, below: int) -> bool:
    """Whether a device is ahead of the others, or would not be longer at this than at full depth, nor the slowest device."""
    seconds, full = seconds_at(memory, device, arm, below=below), memory.arms[FULL_DEPTH]
    if arm == full or seconds <= pace_of(memory, device):
        return True
    return seconds <= min(seconds_at(memory, device, full), summary_of(memory).slowest_full_s)
