"""The suite of `ragkv.testing.policies` on every policy, and what is asked of ours beyond the contract."""

from pathlib import Path

import pytest

from processes import told_by_seeds
from ragkv.benchmarks.compared import COMPARED, make_compared
from ragkv.policies import LRU, POLICIES, Adaptive, Prioritized, make_policy
from ragkv.testing.policies import NaivePolicy, PolicyTests, chain

FACTORIES = dict(COMPARED)
FACTORIES["prioritized-lru"] = lambda: Prioritized(LRU)
FACTORIES["prioritized-adaptive"] = lambda: Prioritized(Adaptive)


class TestPolicies(PolicyTests):
    @pytest.fixture(params=sorted(FACTORIES), autouse=True)
    def chosen(self, request):
        self.name = request.param

    def make(self):
        return FACTORIES[self.name]()

    def model(self):
        return RankedPolicy(self.name)

    def test_what_came_first_goes_first(self, policy):
        policy.insert("a", weight=5)
        policy.insert("b", weight=2)
        assert policy.evict(4) == ["a"]
        assert "a" not in policy and "b" in policy

    def test_wrong_use_is_told(self, policy):
        chain(policy, "a", "b")
        with pytest.raises(ValueError, match="tracked already"):
            policy.insert("a")
        with pytest.raises(ValueError, match="below 1"):
            policy.insert("x", weight=0)
        with pytest.raises(ValueError, match="1 children"):
            policy.remove("a")
        with pytest.raises(ValueError, match="not pinned"):
            policy.unpin("a")


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=f"'mru' is not one of {', '.join(sorted(POLICIES))}"):
        make_policy("mru")


@pytest.mark.parametrize("name", ["arc", "lfu", "s3fifo", "wtinylfu"])
def test_what_was_used_again_outlives_a_scan(name):
    policy = make_compared(name)
    for key in range(50):
        policy.insert(key)
    for key in [*range(50)] * 2:
        policy.touch(key)
    for key in range(50, 500):
        if len(policy) == 100:
            policy.evict(1)
        policy.insert(key)
    assert sum(key in policy for key in range(50)) >= 45


VICTIMS = """
import sys
sys.path[:0] = {path!r}
from test_policies import FACTORIES
for name in sorted(FACTORIES):
    policy, gone = FACTORIES[name](), []
    keys = [b"%d" % (i * i % 97) if i % 2 else str(i * i % 89) for i in range(3000)]
    for key in keys:
        if key in policy:
            policy.touch(key)
        else:
            if len(policy) > 30:
                gone += policy.evict(1)
            policy.insert(key)
    print(name, gone)
"""


def test_decisions_are_the_same_in_every_process():
    program = VICTIMS.format(path=[str(each) for each in Path(__file__).parents[:2]])
    told = told_by_seeds(program)
    assert told[0] == told[1] and len(told[0]) == len(FACTORIES)


class RankedPolicy(NaivePolicy):
    """`rank` says who goes first, where the policy's order is as simple as that."""

    def __init__(self, name):
        super().__init__()
        self.rank = RANKS.get(name)
        self.clock = self.inflation = 0
        self.cost, self.born, self.used, self.uses, self.risen = {}, {}, {}, {}, {}

    def insert(self, key, parent, weight, cost):
        super().insert(key, parent, weight, cost)
        self.clock += 1
        self.cost[key], self.born[key], self.used[key], self.uses[key] = cost, self.clock, self.clock, 1
        self.risen[key] = self.inflation

    def touch(self, key):
        self.clock += 1
        self.used[key] = self.clock
        self.uses[key] += 1
        self.risen[key] = self.inflation

    def evict(self, key):
        if self.rank is not None:
            frontier = [each for each in self.parent if not self.held(each) and not self.children(each)]
            assert key == min(frontier, key=lambda each: self.rank(self, each))
        self.inflation = max(self.inflation, RANKS["gdsf"](self, key)[0])
        super().evict(key)


RANKS = {
    "lru": lambda model, key: model.used[key],
    "prioritized-lru": lambda model, key: model.used[key],
    "fifo": lambda model, key: model.born[key],
    "lfu": lambda model, key: (model.uses[key], model.used[key]),
    "gdsf": lambda model, key: (
        model.risen[key] + model.uses[key] * model.cost[key] / model.weight[key],
        model.used[key],
    ),
}
