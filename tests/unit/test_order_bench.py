"""`ragkv bench order`: the log, what no order could exceed, and what is counted."""

import itertools
from collections import Counter

import pytest

from ragkv.benchmarks.internal.fusion_measure import Reply
from ragkv.benchmarks.internal.order import Log, Texts, bound, play, summarize

LOG = Log(pool=6, passages=3, questions=12, past=30, chains=4)
TEXTS = Texts(
    [1, 2],
    [[10 * number + place for place in range(number + 3)] for number in range(1, 7)],
    [[900 + number] for number in range(12)],
)


class FakeEngine:
    """Has what was asked before, token by token, and says of passages which order has the longest prefix of it."""

    def __init__(self):
        self.stored, self.asked, self.evicted = set(), [], 0

    def evict(self, *, ragkv_too=False):
        self.evicted += 1
        if ragkv_too:
            self.stored.clear()

    def held(self, prompt):
        return max((size for size in range(len(prompt)) if tuple(prompt[:size]) in self.stored), default=0)

    def call(self, function, prompt, max_tokens, arguments, *_):
        hints = arguments["kv_transfer_params"]["ragkv"]
        if "order" in hints:
            before, passages = hints["order"]["before"], hints["order"]["passages"]
            orders = itertools.permutations(range(len(passages)))
            best = max(
                orders,
                key=lambda order: self.held([*before, *itertools.chain(*(passages[n] for n in order)), 0]),
            )
            return Reply(0.5, (0,), 0, {"order": {"passages": list(best)}})
        self.asked.append((tuple(prompt), hints))
        held = self.held(prompt)
        self.stored.update(tuple(prompt[:size]) for size in range(len(prompt)))
        return Reply(float(len(prompt) - held), (0,), held, {})


def test_a_log_is_its_seeds_alone_and_its_popular_passages_come_more_often():
    past, questions = LOG.draw()
    assert (past, questions) == LOG.draw() != Log(6, 3, 12, past=30, chains=4, seed=1).draw()
    assert len(past) == 30 and len(questions) == 12 and all(len(set(each)) == 3 for each in past + questions)
    wide = Log(pool=20, questions=500, past=0).draw()[1]
    counts = Counter(number for each in wide for number in each)
    assert counts[0] > counts[5] > counts[19]
    firsts = Counter(each[0] for each in wide)
    assert firsts[0] < 0.4 * counts[0], "the most popular is not always the most relevant"
    with pytest.raises(ValueError, match="allowed: at most --pool, 6"):
        Log(pool=6, passages=7)


def test_every_passage_is_stored_and_the_likely_chains():
    stored = LOG.stored()
    assert stored[:6] == [(number,) for number in range(6)] and 0 < len(stored[6:]) <= 4
    assert all(1 < len(chain) <= 3 for chain in stored[6:])
    assert Log(6, 3, 12, past=30, chains=0).stored() == stored[:6]


def test_no_order_could_share_more_than_one_earlier_prompt_has():
    assert bound([(0,), (1,)], [[0, 1], [1, 0], [2, 3]]) == (1 + 2 + 0) / 6


@pytest.mark.parametrize("ordered", [False, True])
def test_what_is_played_is_counted(ordered):
    engine, done = FakeEngine(), []
    rows = play(engine, TEXTS, LOG, ordered=ordered, progress=lambda: done.append(1))
    assert len(rows) == 12 and len(done) == 12 + len(LOG.stored())
    prompts = [prompt for prompt, _ in engine.asked[-12:]]
    for row, given, prompt in zip(rows, LOG.draw()[1], prompts, strict=True):
        passages = [TEXTS.pool[number] for number in given]
        assert row["passage_tokens"] == sum(map(len, passages)) == len(prompt) - 3
        assert sorted(prompt[2:-1]) == sorted(itertools.chain(*passages))
        assert row["ttft_s"] == len(prompt) - (row["exact"] + 2) + row["asking_s"]
        assert row["asking_s"] == (0.5 if ordered else 0.0)
        if not ordered:
            assert list(prompt[2:-1]) == list(itertools.chain(*passages))
    assert engine.evicted > len(rows) and all(hints["fuse"] is False for _, hints in engine.asked)


def test_stored_order_wins_and_stays_below_the_bound():
    given, ordered = (play(FakeEngine(), TEXTS, LOG, ordered=ordered) for ordered in (False, True))
    limit = bound(LOG.stored(), LOG.draw()[1])
    result = summarize(given, ordered, limit)
    assert result["given_exact"] < result["ordered_exact"] <= 1.2 * limit
    assert result["times"] == result["ordered_exact"] / result["given_exact"] and result["asking_s"] == 0.5
    assert result["ttft_ratio"] == sum(r["ttft_s"] for r in ordered) / sum(r["ttft_s"] for r in given) < 1
