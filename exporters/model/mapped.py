"""Weights that lie in a mapped file leave memory once they have been used; who reads them again has them from the file.

A checkpoint in float32 is mapped by whoever loads it, and so is what an export rounds. The kernel brings pages in as they are
read and keeps them: without this all weights would be in memory after the first forward pass. Linux alone says which memory is
a file's; elsewhere, and of weights in memory of their own, nothing happens.
"""

import ctypes
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

_Name = TypeVar("_Name")
_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ...(.) \S+ \S+ (\d+)", re.MULTILINE)
_OWN = re.compile(r"^Anonymous: +(\d+) kB", re.MULTILINE)
_DONT_NEED = getattr(mmap, "MADV_DONTNEED", None)


class Pages(NamedTuple):
    """Addresses of whole pages, ``end`` being the first after them."""

    start: int
    end: int


def mapped_files() -> list[Pages]:
    """Memory of this process that is a file's, to the bit: nothing was written there that the file does not get."""
    try:
        said = _SMAPS.read_text()
    except OSError:
        return []
    heads = [*_MAPPING.finditer(said)]
    ends = [*(head.start() for head in heads[1:]), len(said)]
    return [
        Pages(int(head[1], 16), int(head[2], 16))
        for head, end in zip(heads, ends, strict=True)
        if int(head[4]) and (head[3] == "s" or not _own_kb(said[head.end() : end]))
    ]


def leave(tensors: Iterable[Tensor], files: Sequence[Pages]) -> None:
    """Take out of memory what of the tensors lies in ``files``; their values stay as they are."""
    for tensor in tensors:
        _drop(_pages_of(tensor, files))


def one_by_one(named: Iterable[tuple[_Name, Tensor]]) -> Iterator[tuple[_Name, Tensor]]:
    """Give tensors with their names, each of which leaves memory when the next is asked for."""
    files = mapped_files()
    for name, tensor in named:
        yield name, tensor
        leave([tensor], files)


@contextmanager
def leaving(module: nn.Module) -> Iterator[None]:
    """For the duration, frozen weights of a part of ``module`` leave memory after its forward, and again after its backward.

    They must not be written to meanwhile, and nothing be traced.
    """
    files = mapped_files()
    frozen = [p for p in module.parameters() if not p.requires_grad]
    leave(frozen, files)
    owners = [part for part in module.modules() if [*part.parameters(recurse=False)]]
    hooks = [owner.register_forward_hook(_after_use(files)) for owner in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        leave(frozen, files)


def _after_use(files: Sequence[Pages]) -> Callable[..., None]:
    """A forward hook; the gradient of what went in is whole when backward has used the weights for the last time."""

    def hook(owner: nn.Module, given: tuple[Any, ...], _output: Any) -> None:
        # Those that the call was given: by functional_call a module is given another's.
        weights = [p for p in owner.parameters(recurse=False) if not p.requires_grad]
        used = [pages for pages in (_pages_of(w, files) for w in weights) if pages.start < pages.end]

        def drop(*_: Any) -> None:
            for pages in used:
                _drop(pages)

        drop()
        for value in given if used else ():
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(drop)  # type: ignore[no-untyped-call]

    return hook


def _pages_of(tensor: Tensor, files: Sequence[Pages]) -> Pages:
    """Pages that hold nothing but the tensor; none if it is not in a file, or is a view with holes."""
    start = tensor.data_ptr()
    end = start + tensor.numel() * tensor.element_size()
    if not _is_dense(tensor) or not any(file.start <= start and end <= file.end for file in files):
        return Pages(0, 0)
    size = mmap.PAGESIZE
    return Pages(-(-start // size) * size, end // size * size)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its values lie one after the other, turned or not."""
    return tensor.is_contiguous() or (tensor.ndim == 2 and tensor.t().is_contiguous())


def _drop(pages: Pages) -> None:
    if pages.start < pages.end:
        _madvise()(pages.start, pages.end - pages.start, _DONT_NEED)


@cache
def _madvise() -> Callable[..., int]:
    found = ctypes.CDLL(None).madvise
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return found


def _own_kb(said: str) -> int:
    """Count the kB of a mapping that are this process's own, being written to: they would be lost."""
    return sum(int(own[1]) for own in _OWN.finditer(said))
