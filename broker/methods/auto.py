"""``--policy auto``: a bandit chooses every device's layer policy, round by round, from what it has gained in which time.

DropPEFT (arXiv 2503.10217) has an online configurator that explores and exploits, per device. As remembered, not confirmed
(``papers.md`` 1.4, [MEM]): its reward is the accuracy gained per second, and a sliding window forgets. All the rest is ours.

- **Time**: a round waits for its devices. Each may take ``patience`` times what the middle device takes for the deepest arm of
  the round. Devices' paces and arms' costs are learned together (``paces``), from the pass for the class-mean head first, where
  there is one.
- **Stages**: a job begins with the uppermost quarter of the layers on every device: see ``stages``. What flows into them is
  kept by every device's hidden cache, from the pass for the head on, so that such rounds are short.
- **Depth**: within its time a device trains the deepest arm, until another is shown to gain no less.
- **Reward**: what tells such arms apart is the loss taken off the device's own held-out part, divided by the longer of the
  round's seconds and the *pace*, the median of what the other devices' work takes. Loss, because the accuracy of twenty rows is
  too coarse.
- **Gains** are those of ``bandit.effects``, as far as they last until the next round; a device's own count with ``pseudo`` trials
  of the fleet.
- **Warm-up**: in every other round every other device tries an arm that nobody has tried. Then ``epsilon`` (explores by chance,
  less from round to round) or ``ucb`` (adds to an arm's gain what its trials leave open).
- **Guards.** An arm that gains quickly at first, as a head does, may have nothing left to gain later. So an arm must also gain a
  share of what the best one gains, growing from 0 to all but ``tolerance``, unless noise could be why it does not. In the last
  ``tail`` of the rounds nothing is explored, an arm must be shown to gain no less than full depth does, by ``tolerance``, and
  devices hold nothing back any more.
- **Frozen below**: where the upper half of the layers is shown to gain as much as all of them, no device trains a layer below
  it, so that every device's hidden cache holds from round to round. Every few rounds is a *pilot*: some of the devices that have
  the time train all layers, and show whether that is still so; before, now and then, some train the upper half alone.
- **Short jobs**: with fewer than ``least`` device-rounds nothing can be told apart: nothing is tried out, and nothing held back.
  Devices have less time before the tail: see ``hurry``.
- **Feasible** is what a device has not declined; if it declined for memory, also nothing that needs as much.
- **Arms** one layer deeper and less deep than the favourite join when it has been the favourite for a while; the worst that was
  tried enough goes where there are too many.
"""

from collections.abc import Sequence

import msgspec

from fleetune.broker.jobs.work import device_work
from fleetune.broker.methods.arms import FULL_DEPTH, Arm, needs_as_much
from fleetune.broker.methods.bandit import Estimate
from fleetune.broker.methods.bandit_memory import (
    Memory,
    Tuning,
    begun,
    is_long,
    is_tail,
    learn,
    summary_of,
)
from fleetune.broker.methods.choosing import Candidate, Choice, Configurator
from fleetune.broker.methods.outlook import (
    bonus,
    error_of,
    gain_at,
    leading,
    limit_s,
    pace_of,
    seconds_at,
)
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.draws import Key, permutation, uniforms

TUNING = Tuning()
_GAIN_LEAST = 1e-6
"""Arms that gain less, or lose, are told apart by their time alone."""


def auto(tuning: Tuning | None = None) -> Configurator:
    """Choose by what was gained; see the module's text."""
    return Configurator(
        lambda settings: begun(settings, tuning or TUNING),
        choose,
        heard,
        prepare=_prepared,
        hears_of_head=True,
    )


def _prepared(memory: Memory, work: LocalWork) -> LocalWork:
    """Work of the round for the head, with what the first round that trains needs."""
    first = memory.settings.head_rounds + 1
    return _of_round(memory, work, first, below=floor_of(memory, first))


def heard(memory: Memory, outcome: Outcome) -> Memory:
    """Learn, and with each round's first outcome see whether the lower layers are to learn."""
    before = memory.round
    memory = learn(memory, outcome)
    if memory.round != before and (upper := _upper(memory)) is not None:
        stays = memory.is_shallow and not is_tail(memory, memory.round)
        memory.is_shallow = _holds(memory, upper) if stays else _is_as_good(memory, upper)
    return memory


def _holds(memory: Memory, upper: Arm) -> bool:
    """Whether the last pilot, if there was one of late, does not say that all layers gain more."""
    found = summary_of(memory).effects.arms
    mine, full = found.get(upper.policy), found.get(FULL_DEPTH)
    if mine is None or full is None or full.num_trials < memory.tuning.trials_least:
        return True
    return mine.mean >= full.mean - _slack(memory, full)


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
    work = _of_round(memory, work, candidate.round, below=below)
    return Choice(msgspec.structs.replace(work, policy=arm.policy), reason)


def _of_round(memory: Memory, work: LocalWork, number: int, *, below: int) -> LocalWork:
    """Work with what all devices of a round have in common: where their caches lie, and what they hold out."""
    held_out = work.held_out if not is_tail(memory, number) and is_long(memory) else 0.0
    return msgspec.structs.replace(work, cache_below=below or -1, held_out=held_out)


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
    device, deepest = candidate.device_id, max(feasible, key=lambda arm: arm.back)
    limit = limit_s(memory, deepest, candidate.round, below=below)
    in_time = _in_time(memory, device, feasible, limit, below)
    if not is_long(memory):
        return _deepest(memory, in_time), "the deepest in its time: the job is too short to try others"
    if is_tail(memory, candidate.round):
        return _settled(memory, device, in_time, below)
    if is_pilot(memory, candidate.round) and candidate.position % 2 == 0 and deepest in in_time:
        return deepest, "pilot: what would all layers gain?"
    upper, is_trial = _upper(memory), candidate.round % memory.tuning.trial == 0
    if upper in in_time and upper is not None and is_trial and candidate.position % 2 and not below:
        return upper, "pilot: what would the upper layers gain?"
    untried = [arm for arm in _in_warm_up_order(memory) if arm.policy not in memory.tried and arm in in_time]
    if untried and candidate.position % 2 and candidate.round % 2 == 0:
        return untried[candidate.position // 2 % len(untried)], "warm-up: the fleet has not tried it"
    lot, place = uniforms(Key(memory.settings.seed, "configurator", candidate.round, candidate.position), 2)
    allowed = [arm for arm in in_time if _gains_enough(memory, arm)] or in_time
    if memory.settings.explore == "epsilon" and lot < _epsilon(memory, candidate.round):
        return allowed[int(place * len(allowed))], "explores"
    return _best(memory, device, allowed, below)


def _in_time(memory: Memory, device: str, feasible: Sequence[Arm], limit: float, below: int) -> list[Arm]:
    """The arms that do not keep the others waiting for longer than that; the quickest, where all would."""
    found = [arm for arm in feasible if seconds_at(memory, device, arm, below=below) <= limit or not limit]
    return found or [min(feasible, key=lambda arm: seconds_at(memory, device, arm, below=below))]


def _in_warm_up_order(memory: Memory) -> list[Arm]:
    arms = list(memory.arms.values())
    order = permutation(Key(memory.settings.seed, "configurator", 0), len(arms))
    return [arms[i] for i in order.tolist()]


def _epsilon(memory: Memory, number: int) -> float:
    chance = memory.tuning.epsilon
    for _ in range(number - 1):
        chance = chance * memory.tuning.epsilon_decay
    return chance


def _best(memory: Memory, device: str, allowed: Sequence[Arm], below: int) -> tuple[Arm, str]:
    """The deepest arm, unless another is shown to be worth more; full depth, or what is nearest, while nothing was measured."""
    deepest = _deepest(memory, allowed)
    found = summary_of(memory).effects.arms
    pace = pace_of(memory, device)

    def reward(arm: Arm) -> float:
        optimism = bonus(memory, device, arm) if memory.settings.explore == "ucb" else 0.0
        seconds = seconds_at(memory, device, arm, below=below)
        return max(gain_at(memory, device, arm) + optimism, _GAIN_LEAST) / max(seconds, pace, _GAIN_LEAST)

    best = max(allowed, key=reward)
    if best != deepest and not _is_shown(memory, found.get(best.policy), found.get(deepest.policy)):
        return deepest, f"the deepest in its time: {_expected(memory, device, deepest, below)}"
    return best, f"most for its time: {_expected(memory, device, best, below)}, pace {pace:.3g} s"


def _is_shown(memory: Memory, mine: Estimate | None, other: Estimate | None) -> bool:
    """Whether enough was tried to say that one arm gains no less than another, but for the tolerance."""
    if mine is None or other is None:
        return False
    if min(mine.num_trials, other.num_trials) < memory.tuning.trials_least:
        return False
    return mine.mean - memory.tuning.sure * error_of(mine, other) >= other.mean - _slack(memory, other)


def _slack(memory: Memory, one: Estimate) -> float:
    """What an arm may gain less than this one."""
    return memory.tuning.tolerance * max(summary_of(memory).effects.level + one.mean, 0.0)


def _expected(memory: Memory, device: str, arm: Arm, below: int) -> str:
    seconds = seconds_at(memory, device, arm, below=below)
    return f"gains {gain_at(memory, device, arm):.3g} in {seconds:.3g} s"


def _settled(memory: Memory, device: str, in_time: Sequence[Arm], below: int) -> tuple[Arm, str]:
    """Of the arms that are shown to gain as much as full depth, the one of the highest reward; else the deepest in time."""
    if shown := [arm for arm in in_time if _is_as_good(memory, arm)]:
        arm, reason = _best(memory, device, shown, below)
        return arm, f"last rounds, {reason}"
    return _deepest(memory, in_time), "last rounds: the deepest in its time"


def _deepest(memory: Memory, arms: Sequence[Arm]) -> Arm:
    """Of the arms that run every layer, if there are such: one that drops layers must be shown to be worth it."""
    whole = [arm for arm in arms if arm.forward == memory.settings.num_layers]
    return max(whole or arms, key=lambda arm: arm.back)


def floor_of(memory: Memory, number: int) -> int:
    """The lowest layer that any device trains in a round, so that what flows into it can be kept."""
    if is_pilot(memory, number):
        return 0
    staged = next(
        (floor for until, floor in memory.tuning.stages if number <= until * memory.settings.rounds), 0.0
    )
    share = max(staged, memory.tuning.shallow if memory.is_shallow else 0.0)
    return int(share * memory.settings.num_layers)


def _upper(memory: Memory) -> Arm | None:
    """The deepest arm that trains nothing of the lower layers; None if there are none, or no such arm."""
    floor = int(memory.tuning.shallow * memory.settings.num_layers)
    above = [arm for arm in memory.arms.values() if floor and arm.lowest >= floor]
    return max(above, key=lambda arm: arm.back, default=None)


def is_pilot(memory: Memory, number: int) -> bool:
    """Whether some devices train all layers in a round, whatever seems best."""
    return is_long(memory) and number % memory.tuning.pilot == 0 and not is_tail(memory, number)


def _gains_enough(memory: Memory, arm: Arm) -> bool:
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
    progress = memory.round / max(1.0, memory.tuning.ripe * memory.settings.rounds)
    asked = (1 - memory.tuning.tolerance) * min(1.0, progress) * (found.level + best.mean)
    return found.level + mine.mean + error_of(mine, best) >= asked


def _is_as_good(memory: Memory, arm: Arm) -> bool:
    """Whether an arm is shown to gain no less than the best and than full depth, but for the tolerance."""
    found = summary_of(memory).effects.arms
    mine, best, full = found.get(arm.policy), leading(memory), found.get(FULL_DEPTH)
    if mine is None or best is None or full is None or full.num_trials < memory.tuning.pilots_least:
        return False
    is_near = mine.mean + error_of(mine, best) >= best.mean - _slack(memory, full)
    return is_near and _is_shown(memory, mine, full)
