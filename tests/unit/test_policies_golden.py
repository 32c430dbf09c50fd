"""Exact hits of every policy on a small generated trace: a change of any decision shows here."""

import pytest

from ragkv.benchmarks.compared import COMPARED, make_compared
from ragkv.policies import Prioritized

CAPACITIES = (60, 240)


def requests():
    """600 prompts over a shared start: a few popular documents, talks that go on, and a corpus read in turn."""
    state = 1

    def chance(size):
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        return (state >> 33) % size

    talks = [["start", f"talk{number}"] for number in range(12)]
    for turn in range(600):
        kind = chance(4)
        if kind < 2:
            document = min(chance(20), chance(20))
            yield ["start"] + [f"popular{document}.{part}" for part in range(2 + document % 5)] + [f"ask{turn}"]
        elif kind == 2:
            talk = talks[chance(12)]
            talk.append(f"turn{turn}")
            yield list(talk)
            if len(talk) > 12:
                del talk[2:]
        else:
            yield ["start"] + [f"corpus{turn % 40}.{part}" for part in range(6)]


def hits(policy, capacity):
    """Blocks found, where a block weighs 1 to 3 and costs 1 to 4, and each request is served as in production."""
    weights, free, found = {}, capacity, 0
    for request in requests():
        pinned, parent = [], None
        for place, key in enumerate(request):
            if key in policy:
                policy.touch(key)
                found += 1
            else:
                weight = weights[key] = 1 + (len(key) + place) % 3
                victims = policy.evict(weight - free)
                if victims is None:
                    break
                free += sum(weights[victim] for victim in victims) - weight
                policy.insert(key, parent, weight, 1.0 + place % 4)
            policy.pin(key)
            pinned.append(key)
            parent = key
        for key in reversed(pinned):
            policy.unpin(key)
    policy.check_integrity()
    return found


GOLDEN = {
    "adaptive": (966, 1630),
    "arc": (941, 1745),
    "fifo": (871, 1507),
    "gdsf": (883, 1774),
    "lfu": (989, 1923),
    "lru": (871, 1507),
    "s3fifo": (956, 1751),
    "wtinylfu": (951, 1881),
}


@pytest.mark.parametrize("name", sorted(COMPARED))
def test_hits_are_exactly_as_before(name):
    assert tuple(hits(make_compared(name), capacity) for capacity in CAPACITIES) == GOLDEN[name]


@pytest.mark.parametrize("name", ["fifo", "gdsf", "lfu", "lru"])
def test_one_class_of_priority_changes_nothing(name):
    assert hits(Prioritized(COMPARED[name]), CAPACITIES[0]) == GOLDEN[name][0]
