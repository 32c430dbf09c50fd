"""Synthetic request traces: pure functions of kind, seed and length.

Blocks are numbers, equal where the content is. Requests have the shape of served prompts: a shared system prompt,
then documents or earlier turns, then what is asked now.

    conversation  users come, each prompt is the last one and more, and after some turns they are gone
    rag           one to four of many Zipf-popular documents, in varying order
    scan          a popular few, and between them a corpus that is read from end to end over and over
    shift         one document, whose popularity is dealt anew every 500 requests
    mixture       all of these, interleaved
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate, count, islice

Request = list[int]
REQUESTS = 4000


class Source:
    """Text never seen before, and chances. Only `random.random` is used: the same in every Python."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed).random
        self._next = count()

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.chance() * (high - low + 1))

    def text(self, low: int, high: int) -> Request:
        """Between low and high new blocks."""
        return list(islice(self._next, self.number(low, high)))

    def texts(self, size: int, low: int, high: int) -> list[Request]:
        """`size` different texts."""
        return [self.text(low, high) for _ in range(size)]

    def shuffled(self, size: int) -> list[int]:
        """The numbers below `size` in some order."""
        return [place for _, place in sorted((self.chance(), place) for place in range(size))]

    def zipf(self, size: int, skew: float) -> Callable[[], int]:
        """Draws ranks below `size`, rank r in proportion to 1 / (r + 1) ** skew."""
        sums = list(accumulate((rank + 1) ** -skew for rank in range(size)))
        return lambda: bisect_right(sums, self.chance() * sums[-1], 0, size - 1)


def conversation(source: Source) -> Iterator[Request]:
    """Up to 300 talks over three system prompts; one in five begins with a long document."""
    systems = source.texts(3, 2, 8)
    talks: list[Request] = []
    while True:
        if len(talks) < 300 and source.chance() < 0.25:
            context = source.text(20, 60) if source.chance() < 0.2 else []
            talks.append(systems[source.number(0, 2)] + context)
        if talks:
            place = len(talks) - 1 - int(source.chance() ** 2 * len(talks))  # rather one that began lately
            talks[place] = talks[place] + source.text(1, 6)
            yield talks[place]
            if source.chance() < 0.2:
                del talks[place]


def rag(source: Source) -> Iterator[Request]:
    """800 documents of 2 to 24 blocks."""
    system, documents, rank = source.text(4, 4), source.texts(800, 2, 24), source.zipf(800, 1.0)
    while True:
        chosen = {rank(): None for _ in range(source.number(1, 4))}
        order = source.shuffled(len(chosen))
        ranks = list(chosen)
        yield system + [block for place in order for block in documents[ranks[place]]] + source.text(1, 2)


def scan(source: Source) -> Iterator[Request]:
    """60 popular documents, and a corpus of 300."""
    system, popular, rank = source.text(4, 4), source.texts(60, 4, 24), source.zipf(60, 0.8)
    corpus = source.texts(300, 8, 24)
    while True:
        for document in corpus:
            while source.chance() < 0.5:
                yield system + popular[rank()] + source.text(1, 2)
            yield system + document + source.text(1, 1)


def shift(source: Source) -> Iterator[Request]:
    """400 documents."""
    system, documents, rank = source.text(4, 4), source.texts(400, 4, 24), source.zipf(400, 1.1)
    while True:
        order = source.shuffled(400)
        for _ in range(500):
            yield system + documents[order[rank()]] + source.text(1, 2)


def mixture(source: Source) -> Iterator[Request]:
    """Each request comes from one of the others, with equal chances."""
    parts = [make(source) for make in (conversation, rag, scan, shift)]
    while True:
        yield next(parts[source.number(0, len(parts) - 1)])


KINDS: dict[str, Callable[[Source], Iterator[Request]]] = {
    make.__name__: make for make in (conversation, rag, scan, shift, mixture)
}


def generate(kind: str, seed: int = 0, requests: int = REQUESTS) -> list[Request]:
    """The first `requests` requests of a kind. KeyError: no such kind."""
    return list(islice(KINDS[kind](Source(seed)), requests))
