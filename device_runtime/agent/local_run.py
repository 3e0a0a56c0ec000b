"""The work of one offer, a step at a time: training with its checkpoints, or an evaluation; gives what is to be delivered."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fleetune.device_runtime.agent.both_models import measure_both
from fleetune.device_runtime.agent.codec_memory import CodecMemory, Places, put_back, taken
from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.agent.held_adapters import wanted_sha256
from fleetune.device_runtime.agent.home import Home
from fleetune.device_runtime.agent.lazy_upload import spared
from fleetune.device_runtime.agent.masking import Masking
from fleetune.device_runtime.agent.personal_layers import PersonalLayers
from fleetune.device_runtime.agent.telling import Progress
from fleetune.device_runtime.agent.trainer_port import Stepped, Training, Workbench
from fleetune.device_runtime.arrays import Arrays, same_bits, to_bytes
from fleetune.device_runtime.contracts.class_means import COUNTS, SUMS, blank_sums, shortened_sums
from fleetune.device_runtime.contracts.codecs import (
    Codec,
    Packed,
    chain_of,
    make_codec,
    pack,
    with_feedback,
)
from fleetune.device_runtime.contracts.codecs.codec import as_kind, of_kind
from fleetune.device_runtime.contracts.codecs.feedback import RESIDUAL
from fleetune.device_runtime.contracts.gaussian import NOISE_SECRET, derived, new_secret
from fleetune.device_runtime.contracts.lora import drawn_rows, place_of, trained_part
from fleetune.device_runtime.contracts.masks import Mask, masked
from fleetune.device_runtime.contracts.secure_sums.grid import placed, weight_of, write_numbers
from fleetune.device_runtime.contracts.thresholds import moved, pruned, stays, thresholds_of
from fleetune.device_runtime.contracts.wire import Offer, Report, TransferManifest, UpdateReady
from fleetune.device_runtime.contracts.work import CLASS_MEANS, MASKED, SUMMED, LocalWork
from fleetune.device_runtime.errors import (
    ArtifactError,
    ConfigError,
    FleetuneError,
    StateError,
    TooLittleMemory,
)
from fleetune.device_runtime.tables import Table
from fleetune.device_runtime.terms.behind import behind
from fleetune.device_runtime.terms.clipping import Clipped, hidden
from fleetune.device_runtime.terms.left import Left
from fleetune.device_runtime.terms.tensors import counted

log = logging.getLogger(__name__)

_LOSSES_TOLD = 20


class Product(NamedTuple):
    """What a run gives."""

    header: Report | Callable[[TransferManifest], UpdateReady]
    """A report, or what announces an update once its payload has a manifest."""
    payload: bytes
    """Of an update; empty for a report."""
    event: Event
    left: Left
    """For the owner's record."""


class LocalRun:
    """One offer at work; a run that was killed goes on from its last checkpoint."""

    def __init__(
        self,
        offer: Offer,
        reference: Arrays,
        *,
        home: Home,
        memory: CodecMemory,
        personal: PersonalLayers,
        workbench: Workbench,
        key: str,
        mask: Mask,
        masking: Masking,
        fetch_s: float = 0.0,
    ) -> None:
        """Prepare; the first step starts or restores.

        Args:
            offer: what to do.
            reference: the adapter that it names, float32 by tensor name; not written to.
            home: the device's.
            memory: of its codec.
            personal: the layers that stay here.
            workbench: what to train and evaluate with.
            key: what the checkpoint is kept under.
            mask: whose elements alone travel; empty for all.
            masking: what hides an update that is only summed.
            fetch_s: how long the adapter took to come; 0 if it was at hand.
        """
        self._fetch_s, self._masking = fetch_s, masking
        self._offer, self._reference, self._workbench, self._mask = offer, reference, workbench, mask
        self._home, self._memory, self._personal, self._key = home, memory, personal, key
        self._training: Training | None = None
        self._worked_s = self._step_s = 0.0

    def progress(self, at: Progress) -> Progress:
        """``at``, with how far this run is."""
        if self._offer.role != "train":
            return at._replace(phase="evaluating")
        phase, training = "masking" if self.is_waiting else "training", self._training
        if training is None:
            return at._replace(phase=phase)
        steps = getattr(training, "total_steps", 0)  # not every trainer knows it beforehand
        return at._replace(phase=phase, step=training.step_index, steps=steps, step_s=self._step_s)

    @property
    def is_waiting(self) -> bool:
        """Whether all steps are done, and the masks of what came of them are not there yet."""
        is_done = self._training is not None and self._training.done
        return is_done and self._offer.work.codec == MASKED and not self._masking.is_ready(self._key)

    def step(self) -> Product | None:
        """Do one step, or a whole evaluation; what came of the run, when it is done.

        Raises:
            ConfigError, DataError, ArtifactError, WireError: it cannot be done.
            StateError: what it needs to keep cannot be written.
        """
        try:
            return _ROLES[self._offer.role](self)
        except FleetuneError:
            raise
        except MemoryError as exc:
            raise TooLittleMemory(f"not enough memory for this work: {exc}") from exc
        except Exception as exc:  # a fault of ours in one round is no reason for a device to die
            log.debug("round %d: unexpected", self._offer.round, exc_info=True)
            raise ArtifactError(
                f"unexpected {type(exc).__name__}: {exc}; this is a fault of fleetune"
            ) from exc

    def checkpoint(self) -> None:
        """Keep what is trained so far; StateError if it cannot be written."""
        if self._training and self._training.step_index:
            self._home.state.keep_checkpoint(self._key, self._training.save)

    def _train(self) -> Product | None:
        if self._offer.work.learns == CLASS_MEANS:
            return self._sum()
        if self._training is None:
            self._training = self._started()
            self._worked_s = float(sum(step.seconds for step in self._training.history))
        training = self._training
        if not training.done:
            step = training.step()
            self._home.on_event(Event("step", self._offer.round, _figures(step, training.step_index)))
            self._step_s += (step.seconds - self._step_s) * (0.3 if self._step_s else 1.0)
            self._mind_seconds(step.seconds)
        if training.done and self._home.contract:
            hides_samples = self._offer.work.hides_samples
            self._home.contract.check_effective(training.effective_samples, hides_samples=hides_samples)
        if self.is_waiting:
            self.checkpoint()
            return None
        if training.done:
            return self._pack_sum(training) if self._offer.work.codec in SUMMED else self._pack(training)
        every = self._home.checkpoint_every
        if every and training.step_index % every == 0:
            self.checkpoint()
        return None

    def _started(self) -> Training:
        training = self._workbench.start(self._training_work, self._start_adapter())
        try:
            self._home.state.restore(self._key, training.restore)
        except (StateError, ArtifactError, ConfigError) as exc:
            log.warning("round %d: starting afresh: %s", self._offer.round, exc)
            self._home.state.forget_checkpoints()
        else:
            if training.step_index:
                self._home.on_event(Event("restored", self._offer.round, {"step": training.step_index}))
            return training
        return self._workbench.start(self._training_work, self._start_adapter())

    @property
    def _training_work(self) -> LocalWork:
        """The work as a trainer knows it: what it is packed in is not its concern."""
        work = self._offer.work
        return msgspec.structs.replace(work, codec="fp32") if work.codec in SUMMED else work

    def _start_adapter(self) -> Arrays:
        """The version worked from, with the layers over it that stayed here; own, writable copies."""
        work, own = self._offer.work, self._reference
        if work.personal or stays(work):
            own = self._personal.over(self._reference, self._offer.round)
            return moved(own, thresholds_of(self._reference))
        return {name: np.array(value) for name, value in self._reference.items()}

    def _pack(self, training: Training) -> Product:
        offer, reference = self._offer, self._travelling(self._reference)
        codec = make_codec(offer.work.codec, offer.work.codec_ratio, offer.work.codec_bits)
        places, before = self._places(reference), self._memory.before(offer.round)
        memory = taken(_shared(before, codec, offer), self._reference, places)
        is_split = bool(offer.work.personal) or stays(offer.work)
        own, shared = _split(training.adapter, training.personal if is_split else ())
        trained = self._travelling(shared)
        outgoing = self._hidden(self._allowed(trained, reference), reference)
        held_back = trained.keys() - outgoing.values
        memory, left = _fitting(memory, {n: v for n, v in reference.items() if n not in held_back})
        packed = pack(
            with_feedback(codec),
            _changed(outgoing.values, reference, owed=of_kind(RESIDUAL, memory)),
            reference,
            memory=memory,
            reference_sha256=self._replica,
        )
        instead = self._spared(packed, codec, reference, memory)
        packed = instead or packed
        self._mind_bytes(packed.payload)
        stats = _stats(training.history, training.stats)
        if self._home.contract:
            stats |= {"change_norm": outgoing.norm, "clip_scale": outgoing.scale}
        if is_split:
            stats |= measure_both(training.measure, training.adapter, self._reference)
        # Before the update is put: a crash in between packs again from the last checkpoint, with what earlier rounds left.
        owed = put_back(packed.memory, before, self._reference, places)
        self._memory.keep(offer.round, {**left, **owed})
        self._keep(own)
        loss = {"loss": stats["loss"]} if "loss" in stats else {}
        kept = {"tensors_kept": len(own)} if own else {}
        kept |= {"skipped": 1} if instead else {}
        event = Event("trained", offer.round, {**loss, "size_bytes": len(packed.payload), **kept})
        record = self._left_of("update", training, outgoing, held_back=len(held_back))
        return Product(self._announcement(stats), packed.payload, event, record)

    def _pack_sum(self, training: Training) -> Product:
        """Put the update on the offer's grid, and mask it if it is to be: the aggregator is told no figure of it alone."""
        offer, reference = self._offer, self._travelling(self._reference)
        trained = self._travelling(training.adapter)
        outgoing = self._hidden(self._allowed(trained, reference), reference)
        weight = weight_of(offer.grid, self._told_samples)
        numbers, num_cut = placed(outgoing.values, reference, offer.grid, weight=weight, seed=offer.work.seed)
        if offer.work.codec == MASKED:
            self._masking.mask(numbers, offer.grid)
        payload = write_numbers(numbers, offer.grid)
        self._mind_bytes(payload)
        figures = {"size_bytes": len(payload), **({"cut": num_cut} if num_cut else {})}
        kind = "masked update" if offer.work.codec == MASKED else "update"
        record = self._left_of(kind, training, outgoing, held_back=len(trained) - len(outgoing.values))
        seconds = float(sum(step.seconds for step in training.history))
        header = self._announcement({"seconds": seconds})
        return Product(header, payload, Event("trained", offer.round, figures), record)

    def _allowed(self, trained: Arrays, reference: Arrays) -> Clipped:
        """What of an update its owner lets go, and how much of its change."""
        contract = self._home.contract
        return contract.outgoing(trained, reference) if contract else Clipped(trained, 0.0, 1.0)

    def _hidden(self, kept: Clipped, reference: Arrays) -> Clipped:
        """An update as the aggregator asks for it: of bounded norm, and with noise.

        The noise follows from this device's secret, the offer and the update: whoever makes the same update again, after a kill
        or because it is asked for again, makes the same noise. Noise that differs could be averaged away.
        """
        work = self._offer.work
        if not work.most_norm:
            return kept
        secret = self._home.files.secret(NOISE_SECRET, new_secret)
        update = sha256(to_bytes(kept.values)).digest()
        source = derived(secret, self._key.encode(), update)
        return hidden(kept, reference, norm_max=work.most_norm, noise=work.noise, source=source)

    def _told(self, stats: Mapping[str, float]) -> dict[str, float]:
        """Figures that come with an update: none beside noise, which does not cover them."""
        if self._offer.work.noise or self._offer.work.hides_samples:
            return {}
        more = {**stats, **({"fetch_seconds": self._fetch_s} if self._fetch_s else {})}
        return self._home.contract.figures(more) if self._home.contract else more

    def _mind_seconds(self, seconds: float) -> None:
        self._worked_s += seconds
        if self._home.contract:
            self._home.contract.check_seconds(self._worked_s)

    def _mind_bytes(self, payload: bytes) -> None:
        if self._home.contract:
            self._home.contract.check_bytes(len(payload))

    def _left_of(self, kind: str, training: Training, outgoing: Clipped, *, held_back: int) -> Left:
        """The line of what training has made; ``held_back`` tensors of it stay here."""
        work = self._offer.work
        return self._left(
            kind,
            steps=training.step_index,
            tensors=counted(outgoing.values),
            held_back=held_back,
            norm=outgoing.norm,
            scale=outgoing.scale,
            most_norm=work.most_norm,
            noise=work.noise,
            sample_noise=work.sample_noise,
            epsilon=self._epsilon(),
        )

    def _epsilon(self) -> float:
        """What the owner's data has spent, this work included; 0 where nothing is spent, or nobody counts."""
        contract = self._home.contract
        return contract.epsilon() if contract and self._offer.work.hides_samples else 0.0

    @property
    def _told_samples(self) -> int:
        """Samples as the aggregator is told of them with the update: where each is hidden, all devices count the same."""
        return 1 if self._offer.work.hides_samples else self._workbench.num_samples

    def _left(self, kind: str, **figures: Any) -> Left:
        """The line of the owner's record, but for the time, size and digest."""
        offer = self._offer
        return Left(
            when="",
            job=offer.job,
            round=offer.round,
            version=offer.version,
            task_id=offer.task_id,
            kind=kind,
            **{"samples": self._num_samples, **figures},
        )

    @property
    def _num_samples(self) -> int:
        """Of this device's own, each counted once: behind the update, or all of them behind an evaluation."""
        contract, have, work = self._home.contract, self._workbench.num_samples, self._offer.work
        if self._offer.role != "train":
            return have
        return behind(work, contract.num_used(work, have) if contract else have).samples

    def _spared(self, packed: Packed, codec: Codec, reference: Arrays, memory: Arrays) -> Packed | None:
        if not self._offer.lazy:
            return None
        bound, named = self._offer.lazy, self._replica
        return spared(packed, codec, reference, memory=memory, bound=bound, reference_sha256=named)

    @property
    def _replica(self) -> str:
        """SHA-256 of the adapter that the update is a difference from; empty where that is the version itself."""
        return "" if self._offer.is_exact else wanted_sha256(self._offer)

    def _places(self, part: Arrays) -> Places:
        """Where in its tensor lies what travels of each, of those in ``part`` that do not travel whole."""
        drawn = drawn_rows(self._reference, self._offer.work)
        rows: Places = {name: place_of(name, found) for name, found in drawn.items() if name in part}
        return {**rows, **{name: bits for name, bits in self._mask.items() if name in part}}

    def _travelling(self, arrays: Arrays) -> Arrays:
        """The part of an adapter that this offer's update holds."""
        return masked(trained_part(arrays, self._offer.work), self._mask)

    def _sum(self) -> Product:
        """Class sums of all samples in one go, in the bits that the work says; there is no memory to keep."""
        offer, class_sums = self._offer, self._workbench.class_sums
        if class_sums is None:
            raise ConfigError("this device makes no class sums")
        sums, stats = class_sums(offer.work, self._reference)
        sums = self._home.contract.class_sums(sums) if self._home.contract else sums
        packed = pack(
            make_codec(offer.work.codec),
            shortened_sums(sums, offer.work.sums_bits),
            blank_sums(*sums[SUMS].shape),
        )
        self._mind_bytes(packed.payload)
        event = Event("summed", offer.round, {"size_bytes": len(packed.payload)})
        left = self._left("class sums", samples=int(sums[COUNTS].sum()), tensors=counted(sums))
        return Product(self._announcement(stats), packed.payload, event, left)

    def _announcement(self, stats: Mapping[str, float]) -> Callable[[TransferManifest], UpdateReady]:
        """What announces the update of this offer, once its payload has a manifest."""
        offer = self._offer
        header = partial(
            UpdateReady,
            device_id=self._home.identity.device_id,
            job=offer.job,
            task_id=offer.task_id,
            round=offer.round,
            version=offer.version,
            codec=offer.work.codec,
            num_samples=self._told_samples,
            stats=self._told(stats),
            histogram=[*self._workbench.histogram()] if offer.work.histogram and not offer.work.noise else [],
        )
        return lambda manifest: header(payload=manifest)

    def _keep(self, own: Arrays) -> None:
        if self._offer.work.personal or stays(self._offer.work):
            # With the thresholds that they go by: the next ones move them.
            self._personal.keep(self._offer.round, {**own, **thresholds_of(self._reference)})
            self._workbench.keep(pruned({**self._reference, **own}))

    def _evaluate(self) -> Product:
        offer = self._offer
        measured = self._workbench.evaluate(offer.work, self._reference)
        if not np.isfinite(measured.loss):
            raise ArtifactError(
                f"the loss is {measured.loss}: NaN in the model's weights, or an adapter that ran away"
            )
        report = Report(
            device_id=self._home.identity.device_id,
            job=offer.job,
            task_id=offer.task_id,
            round=offer.round,
            version=offer.version,
            loss=measured.loss,
            accuracy=measured.accuracy,
            num_samples=measured.num_samples,
        )
        figures = {"loss": measured.loss, "accuracy": measured.accuracy}
        left = self._left("report")
        return Product(report, b"", Event("evaluated", offer.round, figures), left)


def _stats(steps: Sequence[Stepped], more: Mapping[str, float]) -> dict[str, float]:
    """What whoever chooses a device's next work may learn from this one; empty without a step."""
    if not steps:
        return {}
    first, last = steps[:_LOSSES_TOLD], steps[-_LOSSES_TOLD:]
    return {
        "loss": float(np.mean([step.loss for step in last])),
        "loss_first": float(np.mean([step.loss for step in first])),
        "active_layers": float(np.mean([step.active_layers for step in steps])),
        "seconds": float(sum(step.seconds for step in steps)),
        **more,
    }


def _figures(step: Stepped, step_index: int) -> dict[str, float]:
    return {
        "step": step_index,
        "loss": step.loss,
        "active_layers": step.active_layers,
        "seconds": step.seconds,
    }


def _split(adapter: Arrays, personal: Collection[str]) -> tuple[Arrays, Arrays]:
    """What stays here, and what is shared."""
    own = {name: value for name, value in adapter.items() if name in personal}
    return own, {name: value for name, value in adapter.items() if name not in personal}


def _fitting(memory: Arrays, reference: Arrays) -> tuple[Arrays, Arrays]:
    """Split a codec's memory: what fits the tensors that travel now, and what is owed of frozen ones or of another rank."""
    owed = of_kind(RESIDUAL, memory)
    fits = [n for n, value in owed.items() if n in reference and value.shape == reference[n].shape]
    left = as_kind(RESIDUAL, {n: value for n, value in owed.items() if n not in fits})
    return {n: value for n, value in memory.items() if n not in left}, left


def _shared(memory: Arrays, codec: Codec, offer: Offer) -> Arrays:
    """A codec's memory, without what the aggregator should remember too where it does not remember the same."""
    if not codec.receiver or chain_of(memory) == offer.memory:
        return memory
    return {name: value for name, value in memory.items() if name.split("/", 1)[0] not in codec.receiver}


def _changed(values: Arrays, reference: Arrays, *, owed: Arrays) -> Arrays:
    """Only what training touched travels; a layer that never ran costs nothing."""
    touched = {n: v for n, v in values.items() if n in owed or not same_bits(v, reference[n])}
    return touched or values


_ROLES: Table[Callable[[LocalRun], Product | None]] = Table(
    "role", {"train": LocalRun._train, "evaluate": LocalRun._evaluate}
)
