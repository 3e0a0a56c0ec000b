"""``fleetune generate``: the personalised language model writes on, on the device."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.commands.peak_memory import peak_rss_mb
from fleetune.device_runtime.contracts.adapters import load_peft
from fleetune.device_runtime.contracts.artifact import GENERATION, Artifact, open_artifact
from fleetune.device_runtime.contracts.run_file import find_adapter
from fleetune.device_runtime.data.chat import open_chat
from fleetune.device_runtime.data.loading import id_problem, length_max_of
from fleetune.device_runtime.data.text import Engine as Tokens
from fleetune.device_runtime.data.text import Writing, encode_prompt, encode_whole, load_tokenizer
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.decoding import IDS, Decoding, check_generates
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError
from fleetune.device_runtime.files import read_json
from fleetune.device_runtime.methods.sampling import Sampling, next_token
from fleetune.device_runtime.options import check

log = logging.getLogger(__name__)

STANDARD_INPUT = Path("-")
_PROMPT_BYTES_MAX = 16 * 1024**2
_UNTRAINED = "no adapter given: this text is of version 0, which is not trained"
_NO_STEPS = "the artifact has no graphs for single tokens: every token runs all those before again; export again for speed"
_NO_ENDS = "the artifact does not say which token ends a text: it goes on to --max-tokens; export again"

Ended = Literal["end of text", "stop", "max tokens", "model length"]


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """What was written.

    ``ids`` are its tokens, the one that ended it included. ``seconds_first`` is the time to the first of them, and
    ``tokens_per_s`` counts those after it; None of one token.
    """

    text: str
    ended: Ended
    prompt_tokens: int
    tokens: int
    ids: list[int]
    remembers: bool
    seconds_first: float
    tokens_per_s: float | None
    peak_rss_mb: float


class _Ends(msgspec.Struct, frozen=True):
    eos_token_id: tuple[int, ...] = ()


def generate(
    artifact_dir: Path | str,
    *,
    prompt: str | None = None,
    file: Path | str | None = None,
    chat: bool = False,
    system: str | None = None,
    adapter: Path | str | None = None,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    threads: int = 0,
    on_text: Callable[[str], object] | None = None,
    on_note: Callable[[str], object] | None = None,
) -> Generation:
    """Write on from a prompt, at full depth, until a token ends the text.

    Args:
        artifact_dir: folder made by ``fleetune export --task causal-lm``.
        prompt: text to go on from; or else
        file: a file of UTF-8 text, whose last line end is left out; ``-`` for standard input.
        chat: the prompt is what a user says; the artifact's chat template writes it, to where the answer begins.
        system: said before it, as the template has it; for chats alone.
        adapter: folder that ``train``, ``aggregate`` or ``demo`` wrote, or a PEFT folder; None for version 0.
        sampling: how each token is chosen, and how many there are.
        stop: texts that end it, none of which is written.
        threads: for the kernels; 0 for one a core.
        on_text: called with what comes, as it comes.
        on_note: called with what a person may want to know.

    Raises:
        ConfigError: both or neither of ``prompt`` and ``file``, a value out of range, or an artifact that writes no text.
        ArtifactError, DataError: what is read does not fit, or a prompt that fills the model.
    """
    tell = on_note or log.warning
    check(sampling)
    if (prompt is None) == (file is None):
        raise ConfigError("generate needs either a prompt or a file of it")
    text = read_prompt(Path(file)) if file is not None else prompt or ""
    if any(not one for one in stop):
        raise ConfigError("an empty text to stop at (--stop) is before every text")
    if system and not chat:
        raise ConfigError("what a system says (--system) is for a chat: give --chat too")
    artifact = open_artifact(artifact_dir)
    check_generates(artifact.manifest)
    tokens, ends = _tokens(artifact), _ends(artifact)
    ids = _chat_ids(artifact, tokens, text, system) if chat else encode_prompt(tokens, text, ends)
    room = _room(artifact, ids, tokens)
    weights = load_peft(find_adapter(Path(adapter)), artifact.manifest) if adapter else artifact.adapter()
    if adapter is None:
        tell(_UNTRAINED)
    if not ends:
        tell(_NO_ENDS)
    with open_engine(artifact, threads=threads) as engine:
        decoding = engine.decode(weights)
        if not decoding.remembers:
            tell(_NO_STEPS)
        return _write(
            _Writer(tokens, ids, stop, on_text or (lambda _: None)),
            _tokens_after(ids, decoding, sampling),
            ends=ends,
            most=min(sampling.max_tokens, room),
            is_full=room < sampling.max_tokens,
            remembers=decoding.remembers,
        )


class _Writer:
    """Tells text as it comes, but for what may turn out to be the beginning of a text to stop at."""

    def __init__(
        self, tokens: Tokens, prompt: Sequence[int], stop: Sequence[str], tell: Callable[[str], object]
    ) -> None:
        self._writing, self._stop, self._tell = Writing(tokens.tokenizer, prompt), stop, tell
        self.num_prompt = len(prompt)
        self.text, self._held = "", ""

    def add(self, token: int) -> bool:
        """Take a token; whether the text is over, as one of the texts to stop at has come."""
        self._held += self._writing.add(token)
        if places := [at for one in self._stop if (at := self._held.find(one)) >= 0]:
            self._give(min(places))
            self._held = ""
            return True
        self._give(len(self._held) - self._begun())
        return False

    def end(self) -> None:
        """Tell what was held back."""
        self._held += self._writing.rest()
        self._give(len(self._held))

    def _begun(self) -> int:
        """The most characters at the end of what is held that begin a text to stop at."""
        lengths = (n for one in self._stop for n in range(1, len(one)) if self._held.endswith(one[:n]))
        return max(lengths, default=0)

    def _give(self, count: int) -> None:
        given, self._held = self._held[:count], self._held[count:]
        if given:
            self.text += given
            self._tell(given)


def _write(
    writer: _Writer,
    tokens: Iterator[int],
    *,
    ends: Sequence[int],
    most: int,
    is_full: bool,
    remembers: bool,
) -> Generation:
    started = first = time.monotonic()
    ended: Ended = "model length" if is_full else "max tokens"
    ids: list[int] = []
    for token in tokens:
        ids.append(token)
        first = first if len(ids) > 1 else time.monotonic()
        if token in ends:
            ended = "end of text"
            break
        if writer.add(token):
            ended = "stop"
            break
        if len(ids) == most:
            break
    seconds = time.monotonic() - first
    if ended != "stop":
        writer.end()
    return Generation(
        text=writer.text,
        ended=ended,
        prompt_tokens=writer.num_prompt,
        tokens=len(ids),
        ids=ids,
        remembers=remembers,
        seconds_first=first - started,
        tokens_per_s=(len(ids) - 1) / seconds if len(ids) > 1 and seconds else None,
        peak_rss_mb=peak_rss_mb(),
    )


def _tokens_after(prompt: Sequence[int], decoding: Decoding, sampling: Sampling) -> Iterator[int]:
    """Token after token, without end."""
    given, number = list(prompt), 0
    while True:
        (logits,) = decoding.feed(np.array([given], np.int64))
        _check_finite(logits)
        token = next_token(logits, sampling, number)
        yield token
        given, number = [token], number + 1


def _check_finite(logits: Array) -> None:
    if not np.isfinite(logits).all():
        raise ArtifactError(
            "the model's answers are not finite: NaN in its frozen weights, or an adapter that ran away"
        )


def _tokens(artifact: Artifact) -> Tokens:
    tokenizer = artifact.manifest.tokenizer
    if tokenizer is None:
        raise ConfigError(
            f"{artifact.folder}: the artifact has no tokenizer, so no text goes in or out; put the model's tokenizer.json "
            "beside it and export again"
        )
    return load_tokenizer(
        artifact.folder / tokenizer.file, max_length=tokenizer.max_length, side=tokenizer.truncation_side
    )


def _chat_ids(artifact: Artifact, tokens: Tokens, said: str, system: str | None) -> list[int]:
    """Tokens of a chat in which a user has said something, to where the answer begins."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": said})
    with open_chat(artifact.manifest, artifact.folder) as chat:
        text = chat.render(messages, add_generation_prompt=True)
    (whole,) = encode_whole(tokens, [(text, "")], is_plain=False)
    ids: list[int] = whole.ids.tolist()
    return ids


def _ends(artifact: Artifact) -> tuple[int, ...]:
    if GENERATION not in artifact.manifest.files:
        return ()
    return read_ends(artifact.folder / GENERATION)


def read_ends(path: Path) -> tuple[int, ...]:
    """Tokens that end a text, of ``generation_config.json``; ArtifactError if it cannot be read."""
    found = read_json(path, _Ends)
    return found.eos_token_id if found else ()


def _room(artifact: Artifact, ids: Sequence[int], tokens: Tokens) -> int:
    """How many tokens the model can write after the prompt.

    Raises:
        DataError: none, an empty prompt, or a token without a row.
    """
    manifest = artifact.manifest
    longest = length_max_of(manifest)
    if not ids:
        raise DataError("the prompt is empty: there is no token to go on from; give it some text")
    if longest and len(ids) >= longest:
        raise DataError(
            f"the prompt has {len(ids)} tokens, the model takes {longest} with its answer: shorten it to {longest - 1} at most"
        )
    below = next(row.below for row in manifest.features if row.name == IDS)
    if below and max(ids) >= below:
        raise DataError(f"prompt: {id_problem(IDS, max(ids), below, tokens)}")
    return longest - len(ids) if longest else sys.maxsize


def read_prompt(path: Path) -> str:
    """The text of a file, without its last line end.

    Raises:
        DataError: it cannot be read, is no UTF-8, or is larger than any prompt.
    """
    name = "standard input" if path == STANDARD_INPUT else str(path)
    try:
        if path == STANDARD_INPUT:
            content = sys.stdin.buffer.read(_PROMPT_BYTES_MAX + 1)
        else:
            with path.open("rb") as file:
                content = file.read(_PROMPT_BYTES_MAX + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as exc:
        raise DataError(
            f"{name}: cannot be read as UTF-8 text: {getattr(exc, 'strerror', None) or exc}"
        ) from exc
    if len(content) > _PROMPT_BYTES_MAX:
        raise DataError(f"{name}: more than {_PROMPT_BYTES_MAX} bytes, which is no prompt; shorten it")
    return text.removesuffix("\n").removesuffix("\r")
