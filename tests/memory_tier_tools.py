"""Prompts that share passages, and what their KV looks like, for the tests of the hierarchy."""

import hypothesis.strategies as st

from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.keys import as_tokens
from ragkv.policies.admission import AdmissionPolicy

PAGE_TOKENS, PAGE_BYTES = 4, 100
CHUNKER = Chunker(16, 20, 32, TokenStructure.of(["\n\n", *"abcdefgh"]))
SPACES = [b"namespace of one", b"namespace of two"]

# Prompts share passages, with and without paragraph breaks, and end where they like.
PASSAGES = [[1] * 20 + [0], [2, 3] * 12, [4] * 9, [5, 0], [6, 7, 8] * 7 + [0], [1] * 25, [2, 3] * 8 + [0]]
prompts = st.tuples(
    st.lists(st.sampled_from(PASSAGES), min_size=1, max_size=4).map(
        lambda parts: tuple(token for part in parts for token in part)
    ),
    st.lists(st.integers(1, 4), max_size=2),
).map(lambda parts: (*parts[0], *parts[1]))
names = st.lists(st.integers(1, 60), max_size=1)
spaces = st.sampled_from(SPACES)


def chain_of(space, tokens, named=()):
    chain = TokenChain(space, CHUNKER, named)
    chain.extend(as_tokens(tokens))
    return chain


def values(space, tokens):
    """What the KV of each token looks like: it depends on all before."""
    found, value = [], SPACES.index(space)
    for token in tokens:
        value = hash((value, token))
        found.append(value)
    return found


def common(a, b):
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Door(AdmissionPolicy):
    """Lets everything in, or nothing."""

    open = True

    def admit(self, key, weight=1, cost=1.0):
        assert weight >= 1 and cost > 0
        return self.open
