"""Makes tests/data/tiny_artifact anew: four layers, five classes ``a`` to ``e``, a tokenizer that knows twelve words.

Usage, from the checkout: ``python tests/support/make_tiny_artifact.py``. It needs torch; the tests that read it do not.
"""

from pathlib import Path

import torch
from paths import DATA
from plain_models import Classifier, program
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from words import GROUPS

from fleetune.exporters.writing import Description, write_artifact

FOLDER = DATA / "tiny_artifact"


def make(out: Path) -> None:
    """Export into the folder ``out``; the same versions give the same bytes."""
    words = ["[UNK]", *" ".join(GROUPS).split()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    torch.manual_seed(0)
    description = Description(
        "words",
        "Classifier",
        "sequence-classification",
        tuple("abcde"),
        {"peft_type": "LORA", "r": 4, "lora_alpha": 4},
        tokenizer=tokenizer.to_str().encode(),
        max_length=32,
    )
    write_artifact(program(Classifier((0.25, 0.25, 0.25, 0.25))), description, out)


if __name__ == "__main__":
    make(FOLDER)
