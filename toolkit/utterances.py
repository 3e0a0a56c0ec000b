"""A seeded generator of household voice-assistant utterances, by speakers with habits of their own.

Every speaker prefers some synonyms, intents and word order, and is polite, hesitates and is misheard more or
less often; some lines are vague and fit several intents. So labels are skewed, and no model reads all right.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.phrasebook import CURT, ENDINGS, FILLERS, INTENTS, POLITE, SLOTS, VAGUE

LABELS = tuple(sorted(INTENTS))
VAGUE_SHARE = 0.08
"""Share of lines that fit several intents: about two thirds of these no model can get right."""
_SLOT = re.compile(r"\{(\w+)\}")
_ATTEMPTS = 200


class Utterance(NamedTuple):
    """One line: what was heard, what was meant, and who spoke."""

    text: str
    label: str
    speaker: str


@dataclass(frozen=True)
class Corpus:
    """Training lines by speaker, and test lines by speakers who are in none of them."""

    train: dict[str, list[Utterance]]
    test: list[Utterance]


@dataclass(frozen=True)
class _Speaker:
    name: str
    seed: int
    label_weights: tuple[float, ...]
    politeness: float
    hesitation: float
    misheard: float
    inversion: float
    endings: float


def generate(
    seed: int,
    num_lines: int,
    num_speakers: int,
    *,
    skew: float = 0.7,
    prefix: str = "speaker",
    avoid: Iterable[str] = (),
) -> list[Utterance]:
    """Make ``num_lines`` different lines, speaker by speaker.

    Args:
        seed: equal seeds give equal lines.
        num_lines: over all speakers, shared out nearly evenly.
        num_speakers: how many people talk.
        skew: Dirichlet concentration of each speaker's intents; smaller is more skewed.
        prefix: speakers are called ``prefix-0`` and so on; another prefix is other people.
        avoid: texts that must not occur.

    Raises:
        ConfigError: fewer lines than speakers, or a number that is not positive.
    """
    if num_speakers < 1 or num_lines < num_speakers or skew <= 0:
        asked = f"{num_lines} lines by {num_speakers} speakers with skew {skew}"
        raise ConfigError(f"{asked}: need lines >= speakers >= 1, skew > 0")
    seen = set(avoid)
    lines: list[Utterance] = []
    for index in range(num_speakers):
        speaker = _speaker(seed, f"{prefix}-{index}", skew)
        rng = np.random.default_rng([seed, crc32(speaker.name.encode()), 1])
        count = num_lines // num_speakers + (index < num_lines % num_speakers)
        lines += [_new_line(rng, speaker, seen) for _ in range(count)]
    return lines


def make_corpus(seed: int, *, num_train: int = 2400, num_test: int = 600, num_speakers: int = 4) -> Corpus:
    """Training lines of ``num_speakers`` skewed speakers, and test lines of six others, all intents alike."""
    train = generate(seed, num_train, num_speakers)
    guests = generate(seed, num_test, 6, skew=50.0, prefix="guest", avoid={line.text for line in train})
    return Corpus(by_speaker(train), guests)


def by_speaker(lines: Iterable[Utterance]) -> dict[str, list[Utterance]]:
    """Group lines by who spoke, in order of first appearance."""
    groups: dict[str, list[Utterance]] = {}
    for line in lines:
        groups.setdefault(line.speaker, []).append(line)
    return groups


def write_lines(path: Path, lines: Iterable[Utterance]) -> None:
    """Write lines as JSON lines with ``text``, ``label`` and ``speaker``."""
    path.write_text("".join(json.dumps(line._asdict()) + "\n" for line in lines), encoding="utf-8")


def _speaker(seed: int, name: str, skew: float) -> _Speaker:
    own = crc32(name.encode())
    rng = np.random.default_rng([seed, own, 0])
    weights = rng.dirichlet(np.full(len(LABELS), skew)) * 0.9 + 0.1 / len(LABELS)
    politeness, hesitation, misheard, inversion, endings = rng.beta(1.2, 2.5, size=5)
    return _Speaker(
        name,
        seed ^ own,
        tuple(weights / weights.sum()),
        politeness=politeness,
        hesitation=0.5 * hesitation,
        misheard=0.1 * misheard,
        inversion=0.6 * inversion,
        endings=0.7 * endings,
    )


def _new_line(rng: np.random.Generator, speaker: _Speaker, seen: set[str]) -> Utterance:
    for _ in range(_ATTEMPTS):
        line = _line(rng, speaker)
        if line.text not in seen:
            seen.add(line.text)
            return line
    raise ConfigError(f"{speaker.name} has nothing new left to say after {len(seen)} lines; ask for fewer")


def _line(rng: np.random.Generator, speaker: _Speaker) -> Utterance:
    label = str(rng.choice(LABELS, p=speaker.label_weights))
    templates = INTENTS[label]
    if rng.random() < VAGUE_SHARE:
        templates = _vague_for(label) or templates
    phrase = _expand(rng, speaker, _pick(rng, speaker, label, templates))
    words = _decorate(rng, speaker, _reorder(rng, speaker, phrase).split())
    return Utterance(" ".join(_mishear(rng, speaker, word) for word in words), label, speaker.name)


def _vague_for(label: str) -> tuple[str, ...]:
    return tuple(phrase for labels, phrases in VAGUE.items() if label in labels for phrase in phrases)


def _pick(rng: np.random.Generator, speaker: _Speaker, slot: str, options: Sequence[str]) -> str:
    """Draw from ``options`` by the speaker's own lasting preferences."""
    habit = np.random.default_rng([speaker.seed, crc32(slot.encode())]).dirichlet(np.full(len(options), 0.8))
    weights = 0.8 * habit + 0.2 / len(options)
    return options[int(rng.choice(len(options), p=weights / weights.sum()))]


def _expand(rng: np.random.Generator, speaker: _Speaker, phrase: str) -> str:
    while _SLOT.search(phrase):
        phrase = _SLOT.sub(lambda mark: _pick(rng, speaker, mark[1], SLOTS[mark[1]]), phrase)
    return phrase


def _reorder(rng: np.random.Generator, speaker: _Speaker, phrase: str) -> str:
    """Put a closing ``in the …`` or ``at …`` first, as some people do."""
    found = re.match(r"(.+?) ((?:in the|at|on|before|around|for) .+)$", phrase)
    if found and rng.random() < speaker.inversion:
        return f"{found[2]} , {found[1]}"
    return phrase


def _decorate(rng: np.random.Generator, speaker: _Speaker, words: list[str]) -> list[str]:
    opening = _pick(rng, speaker, "opening", POLITE if rng.random() < speaker.politeness else CURT).split()
    if rng.random() < speaker.hesitation:
        words.insert(int(rng.integers(len(words))), _pick(rng, speaker, "filler", FILLERS))
    ending = _pick(rng, speaker, "ending", ENDINGS).split() if rng.random() < speaker.endings else []
    return [*opening, *words, *ending]


def _mishear(rng: np.random.Generator, speaker: _Speaker, word: str) -> str:
    """Swap, drop or double a letter, as a bad microphone or thumb does."""
    if len(word) < 3 or rng.random() >= speaker.misheard:
        return word
    at = int(rng.integers(1, len(word) - 1))
    return (
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
    )[int(rng.integers(3))]
