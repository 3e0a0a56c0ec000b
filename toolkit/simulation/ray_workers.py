"""Workers on a Ray cluster: actors, each on one core, which find artifact and data under the same paths as this machine."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleetune.device_runtime.errors import TransportError, lacking, one_line
from fleetune.toolkit.simulation.jobs import Done, decode_done, decode_task, encode
from fleetune.toolkit.simulation.pool import Pool
from fleetune.toolkit.simulation.workers import make_bench

LOCAL = "local"


class RayWorkers(Pool["RayActor"]):
    """Actors of a cluster. One that dies is replaced, and its task is done again, once."""

    def __init__(self, artifact_dir: Path, address: str, count: int | None) -> None:
        """Connect, or start a cluster of this machine.

        Args:
            artifact_dir: the same folder on each machine of the cluster.
            address: as of ``ray.init``, or ``local``.
            count: actors; None for one a core of the cluster.

        Raises:
            ConfigError: Ray is not installed.
            TransportError: no cluster there.
        """
        self._ray = ray = _ray()
        try:
            ray.init(
                address=None if address == LOCAL else address,
                num_cpus=count if address == LOCAL else None,
                include_dashboard=False if address == LOCAL else None,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as exc:
            raise TransportError(f"ray {address}: no cluster: {one_line(exc)}") from exc
        kind = ray.remote(num_cpus=1, max_restarts=0)(_Actor)
        cores = int(ray.cluster_resources().get("CPU", 1))
        folder = str(artifact_dir.resolve())
        super().__init__(lambda: RayActor(ray, kind.remote(folder)), self._arrived, count or cores)

    def close(self) -> None:
        """Let go of the cluster."""
        super().close()
        self._ray.shutdown()

    def _arrived(
        self, at_work: Sequence["RayActor"], timeout_s: float | None
    ) -> list[tuple["RayActor", Done | None]]:
        by_reference = {one.references[0]: one for one in at_work}
        found, _ = self._ray.wait(list(by_reference), num_returns=1, timeout=timeout_s)
        return [(by_reference[reference], by_reference[reference].take()) for reference in found]


class RayActor:
    """One actor, and what it has been given."""

    def __init__(self, ray: Any, actor: Any) -> None:
        """Take an actor that is being started."""
        self.references: deque[Any] = deque()
        self._ray, self._actor = ray, actor

    def give(self, content: bytes) -> None:
        """Send a task."""
        self.references.append(self._actor.do.remote(content))

    def take(self) -> Done | None:
        """What came of the first; None if the actor has died."""
        try:
            return decode_done(self._ray.get(self.references.popleft()))
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError):
            return None

    def stop(self) -> None:
        """Kill it."""
        self._ray.kill(self._actor)


class _Actor:
    """The worker's side."""

    def __init__(self, artifact_dir: str) -> None:
        self._bench = make_bench(Path(artifact_dir))

    def do(self, content: bytes) -> bytes:
        return encode(self._bench.do(decode_task(content)))


def _ray() -> Any:
    try:
        import ray
    except ImportError as exc:
        raise lacking("--ray", "Ray", "ray") from exc
    return ray
