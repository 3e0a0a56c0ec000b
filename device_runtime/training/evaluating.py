"""What a run is measured on beside its end, and when it stops for that: the options."""

from typing import Annotated

import msgspec

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.options import Option, problems, refuse


class Evaluating(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is measured on beside its end, and when it stops for it."""

    eval_split: Annotated[
        float,
        Option(
            "share of --data held out to measure on, of each class alike; 0 for none", at_least=0, below=1
        ),
    ] = 0.0
    eval_every: Annotated[
        int,
        Option(
            "steps between evaluations; 0 for once an epoch with --patience, else at the end alone",
            at_least=0,
        ),
    ] = 0
    patience: Annotated[
        int,
        Option(
            "stop after so many evaluations without a lower loss, and keep the adapter of the lowest; 0 for never",
            at_least=0,
        ),
    ] = 0

    @property
    def is_watching(self) -> bool:
        """Whether there are evaluations before the end."""
        return bool(self.eval_every or self.patience)

    def check(self, *, has_eval: bool) -> None:
        """Raise ConfigError if a number is out of range, or there is nothing, or twice, to measure on."""
        refuse(problems(self))
        if has_eval and self.eval_split:
            raise ConfigError("give --eval or --eval-split, got both")
        if self.is_watching and not (has_eval or self.eval_split):
            raise ConfigError("--eval-every and --patience need --eval or --eval-split, to measure on")
