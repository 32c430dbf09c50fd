"""A tree of prefixes asked about for a while, with a fault in every kind of operation: no wrong answer, no dead
engine."""

import random
from collections import Counter

from rig import beside
from rig.beside import Ask
from rig.engines import differences
from rig.faults import POINTS, STORE_POINTS, Fault
from rig.tiny import VOCABULARY

PROMPTS = 78
A_BATCH = 3
DOCUMENT = 48
TIERS = ("memory", "device", "disk")


class Tree:
    """Prompts that share prefixes and diverge anywhere; turns that bring an answer back; passages that move."""

    def __init__(self, seed):
        self._chance = random.Random(seed)
        self._prompts = [self._some(20)]
        self._passages = [self._some(DOCUMENT) for _ in range(4)]

    def next(self):
        """A request."""
        kind = self._chance.random()
        if kind < 0.2:
            return self._fused()
        text = self._chance.choice(self._prompts)
        if kind < 0.4:  # a prompt that was asked before
            return Ask(text)
        keep = text[: self._chance.randrange(len(text)) + 1] if kind < 0.7 else text
        text = (*keep, *self._some(self._chance.randrange(5, 45)))[-150:]
        self._prompts.append(text)
        return Ask(text, self._chance.randrange(1, 5), salt=self._chance.choice([None, None, None, "other"]))

    def answered(self, asked, answer):
        """The next turn of a conversation may follow."""
        if len(asked.prompt) < 120 and self._chance.random() < 0.3:
            self._prompts.append((*asked.prompt, *answer.tokens, *self._some(4)))

    def _fused(self):
        one, two = self._chance.sample(self._passages, 2)
        begin = self._chance.choice(self._prompts)[:16]
        spans = [(len(begin), len(begin) + DOCUMENT), (len(begin) + DOCUMENT, len(begin) + 2 * DOCUMENT)]
        documents = [{"id": str(number), "start": start, "end": end} for number, (start, end) in enumerate(spans)]
        hints = {"documents": documents, "fuse": True, "recompute_ratio": 1.0}
        return Ask((*begin, *one, *two, *self._some(34)), hints=hints)

    def _some(self, count):
        return tuple(self._chance.randrange(VOCABULARY) for _ in range(count))


def test_a_tree_of_prefixes_with_faults_of_every_kind(rig, plain, combination):
    tree, chance = Tree(str(combination)), random.Random(str(combination))
    points = [*(point for point in POINTS if point != "wait"), *STORE_POINTS]
    wrong, tried, struck, asked, before = [], Counter(), Counter(), 0, hits(rig)
    while asked < PROMPTS or (missing := {*points, *TIERS} - {*struck, *(hits(rig) - before)}):
        assert asked < 4 * PROMPTS, f"faults, or tiers' hits, that never came: {missing}"
        fault = next_fault(points, tried, chance)
        asks = [tree.next() for _ in range(A_BATCH)]
        answers, times = rig.call(beside.ask, asks, fault)
        tried[fault.point] += 1
        struck += Counter({fault.point: times})  # which keeps no zeros
        wrong += [f"{fault}: {text}" for text in differences(plain.answers(asks), answers)]
        for each, answer in zip(asks, answers, strict=True):
            tree.answered(each, answer)
        asked += len(asks)
        if chance.random() < 0.6:
            rig.evict()
    print(f"{combination}: {asked} prompts, faults {dict(struck)}, hit tokens {hits(rig) - before}")
    assert wrong == []


def next_fault(points, tried, chance):
    """Of a point that was tried least until now."""
    point = min(points, key=lambda each: (tried[each], chance.random()))
    return Fault(
        point, times=chance.choice((1, 1, 2, 50)), after=chance.choice((0, 0, 1)), done=chance.random() < 0.5
    )


def hits(rig):
    """Tokens that ragkv brought, by tier."""
    return Counter({tier: int(rig.count(f'ragkv_hit_tokens_total{{tier="{tier}"}}')) for tier in TIERS})
