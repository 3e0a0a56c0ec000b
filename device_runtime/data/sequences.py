"""How texts become the sequences that a causal language model learns from: the options."""

from typing import Annotated

import msgspec

from fleetune.device_runtime.options import Option, problems, refuse

ANSWERS, ALL = LOSS_ON = ("answers", "all")
CUT = 0
"""The overlap of texts that are cut, not split."""


class Sequences(msgspec.Struct, frozen=True, kw_only=True):
    """How texts become sequences; for a causal language model alone."""

    loss_on: Annotated[
        str,
        Option(
            "what of chats and of prompts with completions the loss counts; plain texts count whole",
            choices=LOSS_ON,
        ),
    ] = ANSWERS
    end_of_text: Annotated[
        bool,
        Option("end texts, completions, and chats whose template ends no answer, with the end-of-text token"),
    ] = True
    overlap: Annotated[
        int,
        Option(
            "split what is longer than a sequence, and begin each part with so many tokens of the one before, which do not "
            "count again; 0 to cut it (a .txt is split anyway, by 1)",
            at_least=CUT,
        ),
    ] = CUT
    packing: Annotated[
        bool,
        Option("put short sequences together, up to the longest; none sees another"),
    ] = False

    def check(self) -> None:
        """Raise ConfigError if a value is out of its law."""
        refuse(problems(self))
