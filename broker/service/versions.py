"""The adapter's versions: the newest, and what the open round adds to it."""

import logging
import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import chain

import numpy as np

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.class_mean import class_mean
from fleetune.broker.methods.consensus import consensus, is_vote
from fleetune.broker.methods.exact_sums import Sums, Values
from fleetune.broker.methods.lazy import WINDOW, move2, moved2
from fleetune.broker.methods.private_mean import private_mean
from fleetune.broker.methods.secure_sum import mean_update
from fleetune.broker.methods.strategies import STRATEGIES
from fleetune.broker.methods.strategy import Bound, Gathered, Strategy, Update
from fleetune.broker.service.downlink import Downlink
from fleetune.broker.service.measures import Measures, as_they_count
from fleetune.broker.store.store import Store
from fleetune.broker.tasks import Mark, Task
from fleetune.device_runtime.arrays import Array, Arrays, parse_arrays, to_bytes
from fleetune.device_runtime.contracts.class_means import blank_sums
from fleetune.device_runtime.contracts.codecs import (
    Codec,
    chain_named,
    is_repeat,
    make_codec,
    reference_of,
    unpack,
    update_bytes_max,
)
from fleetune.device_runtime.contracts.fields import FIGURE_MAX
from fleetune.device_runtime.contracts.gaussian import Source
from fleetune.device_runtime.contracts.lora import drawn_rows, trained_part
from fleetune.device_runtime.contracts.masks import Mask, filled, masked, read_mask, write_mask
from fleetune.device_runtime.contracts.secure_sums.grid import check_numbers, payload_bytes, read_numbers
from fleetune.device_runtime.contracts.secure_sums.masking import Unmasking
from fleetune.device_runtime.contracts.thresholds import blank_thresholds
from fleetune.device_runtime.contracts.work import (
    ADAPTER,
    CLASS_MEANS,
    CONSENSUS,
    GRID,
    SUMMED,
    THRESHOLDS,
    SumGrid,
)
from fleetune.device_runtime.errors import StateError, WireError

log = logging.getLogger(__name__)

_MASK = " mask"
"""Name of the next round's mask, uint8, beside the strategy's state; no tensor, and nothing of a strategy's, begins so."""
_HEADING = " heading "
"""Before the name of a tensor: where the fleet goes, float32."""
_MOVES = " moves"
"""Name of how far the last versions moved, float64, newest first; of a lazy job."""
_BLANK: Array = np.zeros(0, np.uint8)
"""Of what is not kept."""
_REFERENCES, _REFERENCE_BYTES = 4, 64 * 1024 * 1024
"""Versions held decoded, for updates to be decoded against: so many at most, and of more bytes together the last one alone."""


class Versions:
    """Every version is in the store; this holds a few in memory, and the sums that make the next."""

    def __init__(
        self, store: Store, settings: Settings, adapter: Arrays, *, noise: Source = os.urandom
    ) -> None:
        """Begin with ``adapter`` as version 0, float32 by tensor name, or resume with what the store holds.

        ``noise`` is drawn anew whenever a version is made; nobody is told of one before it is kept.

        Raises:
            StateError: the store is damaged.
        """
        if store.newest < 0:
            store.add_version(0, to_bytes(_first(adapter, settings)), round_number=0)
        self.newest = store.newest
        self._store, self._settings = store, settings
        self._trained = _strategy_of(settings, noise)
        self._head = class_mean(settings.head, is_short=settings.is_lossy)
        self._references: dict[int, Arrays] = {}
        self._num_references = _REFERENCES
        size_bytes = sum(value.nbytes for value in self.reference(self.newest).values())
        self._num_references = max(1, min(_REFERENCES, _REFERENCE_BYTES // max(1, size_bytes)))
        self._sums = self._strategy.init(self.reference(self.newest))
        self._mask = b""
        self._bits: Mask = {}
        kept = self._kept()
        self._set_mask(kept.get(_MASK, _BLANK).tobytes())
        self._moves = kept.get(_MOVES, _BLANK).tolist()
        self._measures = Measures(
            settings, {n.removeprefix(_HEADING): v for n, v in kept.items() if n.startswith(_HEADING)}
        )
        self._bounds: dict[str, Bound] = {}
        """Of the round that is being closed, by device: how updates beyond them count."""
        self._beyond: dict[str, Bound] = {}
        """The same, of a strategy that counts all alike too."""
        self.downlink = Downlink(store, settings)
        """What devices are sent of them."""
        if settings.work.mask == THRESHOLDS:
            self.downlink.makes_original(sha256(to_bytes(adapter)).hexdigest())
        self._fold()

    def reference(self, version: int) -> Arrays:
        """Tensors of any version, float32 by name, not to be written; StateError if the store has it no more."""
        found = self._references.pop(version, None)
        return self._hold_decoded(
            version, parse_arrays(self._store.version(version)) if found is None else found
        )

    def _hold_decoded(self, version: int, arrays: Arrays) -> Arrays:
        self._references[version] = arrays
        while len(self._references) > self._num_references:
            del self._references[next(iter(self._references))]
        return arrays

    def update_bytes_max(self, task: Task) -> int:
        """Largest payload that the update of a task can have."""
        if task.work.codec in SUMMED:
            return payload_bytes(self._told(task), self._settings.grid)
        return update_bytes_max(_codec_of(task), self._told(task))

    def add(self, task: Task, content: bytes, num_samples: int) -> None:
        """Add the payload of a task's update to what makes the next version.

        Raises:
            WireError: it is malformed or implausible; it is left out.
        """
        if task.work.codec in SUMMED:
            self._check_summand(task, content)
            return
        update = self._update(task, content, num_samples)
        self._sums = self._strategy.add(self._sums, update)
        self._measures.add(update, self._strategy)

    def remembered(self, task: Task) -> str:
        """Chain of what is remembered of a device's updates; empty if nothing is, or its codec needs no memory."""
        if task.work.codec in SUMMED or not _codec_of(task).receiver:
            return ""
        return self._store.memories.chain(task.device_id, self._store.last_update(task.device_id))

    def grid_of(self, task: Task) -> SumGrid:
        """The grid that a task's update is on; blank if it is on none."""
        return self._settings.grid if task.work.codec in SUMMED else SumGrid()

    def close(
        self,
        round_number: int,
        version: int,
        *,
        lost: tuple[str, ...] = (),
        unmasking: Unmasking | None = None,
    ) -> list[Mark]:
        """Combine the updates added since the newest version into ``version``, and return what was noted of their devices.

        Args:
            round_number: the round that makes it.
            version: its number.
            lost: devices that were asked in the round and have sent nothing.
            unmasking: what takes the masks off their sum, where there are any.
        """
        if self._settings.grid.bits:
            self._add_sum(round_number, unmasking)
        reference = self.reference(self.newest)
        state = {name: value for name, value in self._kept().items() if not _is_ours(name)}
        marks = self._hold(round_number)
        gathered = Gathered(lost, self._counted, reference, version, self._settings.outliers)
        if self._strategy.stand_in:
            found = self._strategy.stand_in(gathered, state)
            state = found.state
            self._stand_in(found.updates, round_number)
        if self._strategy.choose:
            new, kept_state = self._strategy.choose(gathered), state
        else:
            new, kept_state = self._strategy.finish(self._sums, reference, state)
        self._finish(round_number, version, new, kept_state, marks)
        return marks

    def _hold(self, round_number: int) -> list[Mark]:
        """Hold the updates to the bounds of their round: if one is beyond them, all are added anew."""
        strategy = self._strategy
        reference = self.reference(self.newest)
        found = self._measures.bounds(strategy, reference, self._arrived, self._store.marks)
        self._beyond, self._bounds = found, {} if strategy.choose else found
        if self._bounds:
            self._sums = strategy.init(reference)
            for update in self._counted():
                self._sums = strategy.add(self._sums, update)
        marks = [*self._measures.marks(found, round_number, counts_all_alike=strategy.choose is not None)]
        for one in marks:
            log.warning("round %d: %s: %s (%s)", round_number, one.device, one.detail, one.kind)
        return marks

    def _counted(self) -> Iterator[Update]:
        """The updates that make the next version, as they count."""
        return as_they_count(self._arrived(), self._bounds, self._strategy)

    def _check_summand(self, task: Task, content: bytes) -> None:
        """Raise WireError for numbers that cannot be those of one device: of masked ones their length alone can be known."""
        numbers = read_numbers(content, self._told(task), self._settings.grid)
        if task.work.codec == GRID:
            check_numbers(numbers, self._settings.grid)

    def _add_sum(self, round_number: int, unmasking: Unmasking | None) -> None:
        """Add the mean of a round's updates, which are only ever summed; one that cannot be leaves the version as it was."""
        updates = self._store.accepted()
        if (first := next(updates, None)) is None:
            return
        reference = self._told(first.task)
        payloads = (update.payload for update in chain((first,), updates))
        try:
            update = mean_update(payloads, reference, self._settings.grid, unmasking=unmasking)
            self._sums = self._strategy.add(self._sums, update)
        except WireError as exc:
            log.error("round %d: its sum is left out, the version stays as it was: %s", round_number, exc)

    def _stand_in(self, updates: Iterable[Update], round_number: int) -> None:
        """Add what stands in for lost updates; one that is implausible is left out, as they would be."""
        count = 0
        for update in updates:
            try:
                self._sums = self._strategy.add(self._sums, update)
            except WireError as exc:
                log.warning("round %d: nothing stands in for a lost update: %s", round_number, exc)
            else:
                count += 1
        if count:
            log.info("round %d: %d updates stand in for lost ones", round_number, count)

    def _finish(
        self, round_number: int, version: int, new: Arrays, kept: Arrays, marks: Iterable[Mark]
    ) -> None:
        mask = self._next_mask(round_number)
        moves = self._next_moves(round_number, new)
        kept = {**kept, **({_MASK: np.frombuffer(mask, np.uint8)} if mask else {})}
        kept |= {_MOVES: np.array(moves)} if moves else {}
        heading = self._measures.next_heading(self._strategy, self._beyond, self._arrived)
        kept |= {_HEADING + name: value for name, value in heading.items()}
        state = to_bytes(kept) if kept else b""
        self._sums = Sums({})  # large ones make room for the file
        self._store.add_version(version, to_bytes(new), round_number=round_number, state=state, marks=marks)
        self.newest = version
        self._hold_decoded(version, new)
        self._set_mask(mask)
        self._moves = moves
        self._sums = self._strategy.init(new)
        self.downlink.close(version)
        if not self._store.memories.is_empty:
            self._store.memories.sweep((who, self._store.last_update(who)) for who in self._measures.devices)
        self._measures.begin(heading)

    @property
    def _strategy(self) -> Strategy:
        """How the next version is made."""
        return self._head if self.newest < self._settings.head_rounds else self._trained

    def _update(self, task: Task, content: bytes, num_samples: int) -> Update:
        """The update of a task; WireError if its payload is malformed."""
        reference = self.reference(task.version)
        return Update(
            self._decoded(task, content),
            reference,
            num_samples,
            staleness=self.newest - task.version,
            rows=drawn_rows(reference, task.work) if task.work.learns == ADAPTER else {},
            device_id=task.device_id,
        )

    def _arrived(self) -> Iterator[Update]:
        """Updates that are in no version yet, as they were added."""
        for task, num_samples, payload in self._store.accepted():
            yield self._update(task, payload, num_samples)

    def _told(self, task: Task) -> Arrays:
        """What the update of a task is a difference from: the version that it starts from, or blank sums."""
        reference = self.reference(task.version)
        if task.work.learns == CLASS_MEANS:
            return blank_sums(*reference[self._settings.head.weight].shape)
        return self._part(reference, task)

    def mask_of(self, task: Task) -> bytes:
        """The mask that the update of a task is cut to, packed; empty for none."""
        is_masked = task.role == "train" and task.work.mask == CONSENSUS and task.work.learns == ADAPTER
        return self._mask if is_masked and task.version == self.newest else b""

    def _part(self, arrays: Arrays, task: Task) -> Arrays:
        """What the update of a task holds of an adapter."""
        return masked(trained_part(arrays, task.work), self._bits_of(task))

    def _bits_of(self, task: Task) -> Mask:
        return self._bits if self.mask_of(task) else {}

    def _set_mask(self, mask: bytes) -> None:
        """Take this mask, empty for none, for the rounds to come."""
        self._mask, self._bits = mask, read_mask(mask, self.reference(self.newest)) if mask else {}

    def _kept(self) -> Arrays:
        """What the newest version's round left for the open one: the strategy's state, and what lies beside it."""
        state = self._store.strategy_state(self.newest)
        return parse_arrays(state) if state else {}

    @property
    def lazy_bound(self) -> float:
        """Squared norm below which a device of the open round may keep its innovation; 0 for none."""
        return min(moved2(self._moves, self._settings.lazy), FIGURE_MAX)

    def _next_moves(self, round_number: int, new: Arrays) -> list[float]:
        """How far this round, which closes now, and those before it moved the model; the round for the head does not count."""
        if not self._settings.lazy or round_number <= self._settings.head_rounds:
            return []
        return [move2(new, self.reference(self.newest)), *self._moves][:WINDOW]

    def _next_mask(self, round_number: int) -> bytes:
        """The mask of the round after this one, which closes now: none if that votes, a new one if this did."""
        settings, reference = self._settings, self.reference(self.newest)
        trained = round_number - settings.head_rounds
        if settings.work.mask != CONSENSUS or trained < 1 or is_vote(trained + 1, settings.mask_every):
            return b""
        if not is_vote(trained, settings.mask_every):
            return self._mask
        found = consensus(self._arrived(), reference, share=settings.mask_share)
        log.info("round %d: mask of %d elements", round_number, sum(bits.sum() for bits in found.values()))
        return write_mask(found, reference) if found else b""

    def _decoded(self, task: Task, content: bytes) -> Values:
        """Values of an update; one from a replica moves the version itself as far as it moved the replica."""
        return filled(self._sent(task, content), self.reference(task.version), self._bits_of(task))

    def _sent(self, task: Task, content: bytes) -> Values:
        """Values of what travelled of the adapter."""
        reference, named = self._told(task), reference_of(content)
        if not named:
            return self._unpacked(task, content, reference)
        replica = self._part(self.downlink.replica(task.version, named), task)
        values = self._unpacked(task, content, replica)
        return {n: np.float64(reference[n]) + (v - np.float64(replica[n])) for n, v in values.items()}

    def _unpacked(self, task: Task, content: bytes, reference: Arrays) -> Values:
        """Values of a payload; what its codec remembers of the device is durable when this returns."""
        codec, memory, memories = _codec_of(task), None, self._store.memories
        if codec.receiver and (chain := chain_named(content)):
            memory = memories.find(task.device_id, chain)
        if not self._settings.lazy and is_repeat(content):
            raise WireError("it repeats the last update, which nobody asked for (lazy)")
        decoded = unpack(codec, content, reference, memory=memory)
        if codec.receiver:
            update = sha256(content).hexdigest()
            memories.keep(task.device_id, update, decoded.memory, version=task.version)
        return decoded.values

    def _fold(self) -> None:
        """Add what was accepted in an earlier life and is in no version yet."""
        for task, num_samples, payload in self._store.accepted():
            try:
                self.add(task, payload, num_samples)
            except WireError as exc:
                raise StateError(
                    f"task {task.task_id!r}: its update in the ledger is damaged: {exc}"
                ) from exc
            log.info("round %d: the update of %s is at hand", task.round, task.device_id)


def _strategy_of(settings: Settings, noise: Source) -> Strategy:
    strategy = STRATEGIES[settings.strategy]()
    if not settings.dp.of_devices:
        return strategy
    return private_mean(strategy, settings.dp, expected=settings.clients, still=settings.still, source=noise)


def _is_ours(name: str) -> bool:
    """Whether state lies beside the strategy's: no tensor and no device has a blank at its front."""
    return name.startswith(" ")


def _first(adapter: Arrays, settings: Settings) -> Arrays:
    """Version 0: of a job of thresholds they are in it."""
    return {**adapter, **(blank_thresholds(adapter) if settings.work.mask == THRESHOLDS else {})}


def _codec_of(task: Task) -> Codec:
    return make_codec(task.work.codec, task.work.codec_ratio, task.work.codec_bits)
