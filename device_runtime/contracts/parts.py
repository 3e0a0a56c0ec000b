"""Parts of a transfer that is published once for all who want it: each has a topic, which a device leaves when it has the part.

A part is what may be on its way to one device at once: of a link of which nothing is known the first four chunks, then sixteen.
"""

FIRST_CHUNKS = 4
PART_CHUNKS = 16
GATHER_S = 5.0
"""So long, at most, an aggregator waits for others after the first device that asked for a part."""


def part_of(index: int) -> int:
    """Which part has this chunk."""
    return 0 if index < FIRST_CHUNKS else 1 + (index - FIRST_CHUNKS) // PART_CHUNKS


def chunks_of(part: int) -> range:
    """Indices of the chunks of a part; the last part of a transfer has fewer."""
    first = FIRST_CHUNKS + (part - 1) * PART_CHUNKS
    return range(first, first + PART_CHUNKS) if part else range(FIRST_CHUNKS)
