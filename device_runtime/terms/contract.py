"""The contract of a device at work: what may begin, how much of what was made may leave, and the record of what did."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from hashlib import sha256

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.accounting import steps_of
from fleetune.device_runtime.contracts.class_means import COUNTS
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, DayIsSpent
from fleetune.device_runtime.files import Files
from fleetune.device_runtime.terms.account import Account, check_spent
from fleetune.device_runtime.terms.behind import num_used
from fleetune.device_runtime.terms.clipping import Clipped, clipped
from fleetune.device_runtime.terms.day import Day, Facts
from fleetune.device_runtime.terms.judging import beneath_effective, objections
from fleetune.device_runtime.terms.left import Left, Record, written_at
from fleetune.device_runtime.terms.tensors import may_leave
from fleetune.device_runtime.terms.terms import Terms

_FLUSH_BYTES = 2**20
"""So many bytes sent may be missing in the count after a kill."""


class Contract:
    """One device's, for as long as its process lives; what it counts and records survives that."""

    def __init__(
        self,
        terms: Terms,
        *,
        facts: Facts,
        files: Files,
        account: Account | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        boot: str = "",
    ) -> None:
        """Take up what was counted; StateError if it cannot be read.

        Args:
            terms: what the owner allows.
            facts: where a day's amounts are kept.
            files: where the record lies, and the account if no other is given.
            account: of what the data has spent.
            clock: seconds, monotonic.
            wall: seconds since 1970, as the system believes.
            boot: of which boot ``clock`` counts; empty where that is not known.
        """
        self._terms, self._clock, self._wall = terms, clock, wall
        self._day, self._record = Day(facts, wall_s=wall(), boot=boot, boot_s=clock()), Record(files)
        self._account = account or Account(files)
        self._unkept_bytes = 0

    def check(
        self,
        work: LocalWork,
        *,
        role: str,
        key: str,
        num_samples: int,
        names: Collection[str],
        data: str = "",
    ) -> None:
        """Hold an offer to the contract; arguments as of :func:`~fleetune.device_runtime.terms.judging.objections`.

        The offer with the ``key`` that was counted last is not held to the rounds of a day again, nor, if it is of the same
        ``data`` (a digest), to what these may spend.

        Raises:
            ConfigError: the work is outside (all limits listed).
            StateError: what was spent cannot be read.
            DayIsSpent: what a day allows is used up.
        """
        found = [*objections(self._terms, work, role=role, num_samples=num_samples, names=names)]
        if found:
            raise ConfigError(f"this device's owner does not allow it: {'; '.join(found)}")
        if role == "train" and work.hides_samples:
            spent_then = self._account.with_more(steps_of(work), key + data)
            check_spent(spent_then, most=self._terms.most_epsilon, delta=self._terms.delta)
        if spent := [*self._spent(key)]:
            raise DayIsSpent(f"this device's owner allows no more today: {'; '.join(spent)}")

    def num_used(self, work: LocalWork, num_samples: int) -> int:
        """Return how many rows of the device's data may train, as :func:`~fleetune.device_runtime.terms.behind.num_used`."""
        return num_used(work, num_samples, least_batch=self._terms.least_batch)

    def begin(self, key: str, *, hiding: LocalWork | None = None, data: str = "") -> None:
        """Count an offer whose work begins; once, however often it is taken up again.

        Args:
            key: of the offer.
            hiding: its work, where that hides samples: its steps are spent.
            data: digest of the samples.

        Raises:
            ConfigError: more would be spent than the owner allows.
            StateError: it cannot be kept.
        """
        if hiding:
            most, delta = self._terms.most_epsilon, self._terms.delta
            self._account.put_down(steps_of(hiding), key + data, most=most, delta=delta)
        self._day.add(self._clock(), wall_s=self._wall(), key=key)

    def check_seconds(self, seconds: float) -> None:
        """Raise ConfigError once the steps of a round have taken longer than the owner allows."""
        most = self._terms.most_seconds
        if most and seconds > most:
            raise ConfigError(
                f"this device's owner does not allow it: most_seconds: {seconds:,.0f} s of work, {most:,.15g} at most"
            )

    def epsilon(self) -> float:
        """Return what this device's data has spent; ConfigError and StateError as of :class:`Account`."""
        return check_spent(self._account.read(), most=0.0, delta=self._terms.delta)

    def check_effective(self, samples: float, *, hides_samples: bool = False) -> None:
        """Raise ConfigError for an update behind which, in effect, are fewer samples than the owner allows.

        Not where each of them is hidden and the owner limits what that spends: a refusal would tell of them without noise.
        """
        if hides_samples and self._terms.most_epsilon:
            return
        for said in beneath_effective(self._terms, samples):
            raise ConfigError(f"this device's owner does not allow it: {said}")

    def outgoing(self, values: Arrays, reference: Arrays) -> Clipped:
        """Return what of an update may leave, its change scaled down to what the owner allows.

        Raises:
            ConfigError: none of its tensors may leave.
        """
        allowed = may_leave(self._terms, values)
        if values and not allowed:
            raise ConfigError(
                "this device's owner does not allow it: may_leave: no tensor of this update may leave"
            )
        return clipped({n: values[n] for n in allowed}, reference, rms_max=self._terms.most_change)

    def figures(self, stats: Mapping[str, float]) -> dict[str, float]:
        """Return what of an update's figures may leave: all, or none."""
        return dict(stats) if self._terms.tell_figures else {}

    def class_sums(self, sums: Arrays) -> Arrays:
        """Return sums by class, zero for classes with fewer samples than the owner allows to tell apart.

        Raises:
            ConfigError: no class has as many.
        """
        least = self._terms.least_of_a_class
        enough = np.greater_equal(sums[COUNTS], max(1, least))
        if not enough.any():
            raise ConfigError(
                f"this device's owner does not allow it: least_of_a_class: no class has {least:,} samples here"
            )
        # One mask for (C, D) and (C,).
        return {n: np.where(enough.reshape(-1, *[1] * (a.ndim - 1)), a, 0) for n, a in sums.items()}

    def check_bytes(self, size_bytes: int) -> None:
        """Raise DayIsSpent if an update of this size is more than may still be sent today."""
        most, sent = self._terms.most_bytes_a_day, self._sent()
        if most and sent + size_bytes > most:
            raise DayIsSpent(
                f"this device's owner allows no more today: most_bytes_a_day: {size_bytes:,} to send, "
                f"{sent:,} of {most:,.15g} are sent"
            )

    def may_send(self) -> bool:
        """Whether any more bytes may be sent today."""
        most = self._terms.most_bytes_a_day
        return not most or self._sent() < most

    def sent(self, num_bytes: int) -> None:
        """Count bytes of updates that were sent, repetitions too; kept on disk now and then. StateError if they cannot be."""
        self._unkept_bytes += num_bytes
        if self._unkept_bytes >= _FLUSH_BYTES:
            self.keep()

    def keep(self) -> None:
        """Write the count of bytes, if it is not on disk; StateError if that cannot be done."""
        if self._unkept_bytes:
            self._day.add(self._clock(), wall_s=self._wall(), sent_bytes=self._unkept_bytes)
            self._unkept_bytes = 0

    def put_down(self, line: Left, payload: bytes) -> None:
        """Record what is about to be offered; StateError if it cannot be written, and then it is not to be offered."""
        self.keep()
        digest = sha256(payload).hexdigest() if payload else ""
        when = written_at(self._wall())
        self._record.add(msgspec.structs.replace(line, when=when, digest=digest, bytes=len(payload)))

    def settled(self, *, job: str, number: int, task_id: str, digest: str, is_accepted: bool) -> None:
        """Record the aggregator's verdict on something that was offered in round ``number``."""
        verdict = "accepted" if is_accepted else "refused"
        when = written_at(self._wall())
        self._record.add(
            Left(when=when, job=job, round=number, task_id=task_id, digest=digest, verdict=verdict)
        )

    def _sent(self) -> int:
        return self._day.spent(self._clock()).sent_bytes + self._unkept_bytes

    def _spent(self, key: str) -> Iterator[str]:
        terms, spent = self._terms, self._day.spent(self._clock())
        if terms.most_rounds_a_day and key != spent.key and spent.rounds >= terms.most_rounds_a_day:
            yield f"most_rounds_a_day: {spent.rounds:,} of {terms.most_rounds_a_day:,} are done"
        if not self.may_send():
            yield f"most_bytes_a_day: {self._sent():,} of {terms.most_bytes_a_day:,.15g} are sent"
