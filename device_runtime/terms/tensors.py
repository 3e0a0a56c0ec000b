"""Which tensors of an adapter may leave a device, by their names: whole kinds of them, or patterns."""

from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

from fleetune.device_runtime.errors import choices
from fleetune.device_runtime.terms.terms import Terms

EMBEDDINGS, HEAD, LORA = KINDS = ("embeddings", "head", "lora")


def kind_of(name: str) -> str:
    """Return the kind of a tensor: of the embeddings, of a LoRA elsewhere, or of what else learns, the head."""
    if "embed" in name.lower():
        return EMBEDDINGS
    return LORA if ".lora_" in name else HEAD


def may_leave(terms: Terms, names: Iterable[str]) -> list[str]:
    """Return those of ``names`` that may leave, in their order."""
    allowed, kept = entries(terms.may_leave), entries(terms.must_stay)
    return [n for n in names if (not allowed or _is_among(n, allowed)) and not _is_among(n, kept)]


def counted(names: Iterable[str]) -> dict[str, int]:
    """Count tensors by kind; kinds of which there are none are left out."""
    found = [kind_of(name) for name in names]
    return {kind: found.count(kind) for kind in KINDS if kind in found}


def entries(text: str) -> list[str]:
    """Split a list of names between commas."""
    return [entry for entry in map(str.strip, text.split(",")) if entry]


def name_problems(terms: Terms, names: Collection[str], policies: Collection[str]) -> Iterator[str]:
    """Yield what names nothing: a tensor or kind that is not among ``names``, a policy that is not among ``policies``."""
    for field in ("may_leave", "must_stay"):
        for entry in entries(getattr(terms, field)):
            if entry not in KINDS and not any(fnmatchcase(name, entry) for name in names):
                yield f"{field} {entry!r}: no tensor is called so; have the kinds {choices(KINDS)}, or a pattern as '*.query.*'"
    for entry in entries(terms.policies):
        if entry not in policies:
            yield f"no policy {entry!r}; have: {choices(policies)}"


def _is_among(name: str, patterns: Collection[str]) -> bool:
    return kind_of(name) in patterns or any(fnmatchcase(name, pattern) for pattern in patterns)
