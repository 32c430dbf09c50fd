"""Turns of conversations: what continues what, and what is counted of it."""

from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from memory_growth import grown
from ragkv.config.settings import FusionSettings
from ragkv.connectors.vllm.turns import SHORTEST, Conversations
from ragkv.kvstore import metrics as m
from ragkv.kvstore.chunking import Chunker, TokenChain, TokenStructure
from ragkv.kvstore.keys import as_tokens
from toy_engine import BREAK, MAX, MIN, Engine, closing, text

CHUNKER = Chunker(MIN, 24, MAX, TokenStructure.of(["a", "\n\n", "b"]))
NAMES = m.TURN_REQUESTS, m.TURN_PROMPT_TOKENS, m.TURN_REUSED_TOKENS


@pytest.fixture
def engine():
    with closing(Engine()) as made:
        yield made


def counted(engine):
    """(requests, prompt tokens, reused tokens) by turn."""
    turns = ("1", "2", "3", "4", "5+")
    found = {turn: tuple(engine.metrics.get(name, turn) for name in NAMES) for turn in turns}
    return {turn: values for turn, values in found.items() if any(values)}


def told(turn):
    return {"kv_transfer_params": {"ragkv": {"turn": turn}}}


# --- what is counted ---


def test_a_conversation_turn_by_turn(engine):
    prompt = text(1, 50)
    for turn in range(7):
        answer = text(100 + turn, 20)
        engine.run(prompt, answer)
        prompt = prompt + answer + text(200 + turn, 10)
    tokens = [50 + 30 * turn for turn in range(7)]
    reused = [0] + [size + 20 - 1 for size in tokens[:-1]]  # all but the last token of the answer
    late = 3, sum(tokens[4:]), sum(reused[4:])
    expected = {str(turn + 1): (1, tokens[turn], reused[turn]) for turn in range(4)}
    assert counted(engine) == expected | {"5+": late}


def test_another_question_about_the_same_document_is_a_first_turn(engine):
    document = text(1, 90)
    engine.run(document + text(2, 12), text(3, 8))
    engine.run(document + text(4, 12), text(5, 8))
    assert counted(engine) == {"1": (2, 204, 90)}


def test_an_answer_in_other_tokens_is_found_by_its_prompt(engine):
    prompt = text(1, 50)
    engine.run(prompt, text(2, 20))
    engine.run(prompt + text(3, 19) + text(4, 10))
    assert counted(engine).keys() == {"1", "2"}


def test_the_same_prompt_again_is_the_same_turn_again(engine):
    first, answer, question = text(1, 50), text(2, 20), text(3, 10)
    for _ in range(2):
        engine.run(first, answer)
    for _ in range(2):
        engine.run(first + answer + question, answer)
    assert {turn: values[0] for turn, values in counted(engine).items()} == {"1": 2, "2": 2}


@pytest.mark.parametrize("local", [0, 32])
def test_the_engines_own_hits_count_as_reused(engine, local):
    prompt = text(1, 60)
    engine.run(prompt)
    engine.run(prompt, local=local)
    assert counted(engine) == {"1": (2, 120, 59)}


def test_a_preempted_request_counts_once(engine):
    request = engine.request(text(1, 70))
    engine.step(budget=40)
    engine.preempt(request)
    engine.step()
    assert counted(engine) == {"1": (1, 70, 0)}


def test_what_a_fusion_computes_is_not_reused():
    with closing(Engine(pages=800, blocks=400, fusion=FusionSettings(enabled=True, min_tokens=16))) as engine:
        system, passages, question = text(9, 40), [[*text(n, 90), BREAK] for n in range(3)], text(8, 40)
        for passage in passages:
            engine.run(system + passage, kv_transfer_params={"ragkv": {"turn": 0, "fuse": False}})
        hit = engine.run([*system, *passages[2], *passages[0], *passages[1], *question])
        ((requests, tokens, reused),) = counted(engine).values()
        computed = sum(engine.metrics.get(m.FUSED_TOKENS, kind) for kind in ("recomputed", "gap"))
    assert (requests, tokens) == (1, 40 + 3 * 91 + 40)
    assert computed > 0 and reused == hit - computed


def test_worlds_have_their_own_conversations(engine):
    prompt = text(1, 60)
    engine.run(prompt)
    engine.run(prompt + text(2, 30), cache_salt="x", world=1)
    assert counted(engine).keys() == {"1"}


def test_what_is_left_alone_is_not_counted(engine):
    engine.run(text(1, 60), prompt_embeds=object())
    assert counted(engine) == {}


@pytest.mark.parametrize(("hinted", "turn", "following"), [(3, "3", "4"), (9, "5+", "5+")])
def test_a_hint_is_believed_and_goes_on(engine, hinted, turn, following):
    prompt = text(1, 60)
    engine.run(prompt, **told(hinted))
    assert {each: values[0] for each, values in counted(engine).items()} == {turn: 1}
    engine.run(prompt + text(2, 30))
    assert counted(engine)[following][0] == 1 + (turn == following)


def test_a_request_outside_conversations_is_neither_counted_nor_continued(engine):
    prompt = text(1, 60)
    engine.run(prompt, **told(0))
    assert counted(engine) == {}
    for following in (prompt + text(2, 30), prompt):
        engine.run(following)
    assert {turn: values[0] for turn, values in counted(engine).items()} == {"1": 2}


def test_an_aborted_request_that_never_ran_is_not_counted(engine):
    free, engine.free = engine.free, []
    request = engine.request(text(1, 60))
    engine.step()
    engine.finish(request)
    engine.free = free
    assert counted(engine) == {}


def test_a_prompt_that_ends_with_a_paragraph_is_found_whatever_follows():
    """Whether a chunk ends there is only known from the next token."""
    conversations, prompt = Conversations(), [*text(1, 40)[:39], BREAK]
    conversations.remember(b"world", chain_of(b"world", prompt), 1)
    for more in ([BREAK, *text(2, 30)], text(3, 30)):
        assert conversations.turn(b"world", chain_of(b"world", prompt + more)) == 2


# --- what is remembered ---

ALPHABET = [[1], [2], [BREAK], text(1, MIN - 1), text(2, 25), text(3, MAX + 3)]
PARTS = st.lists(st.integers(0, len(ALPHABET) - 1), max_size=4)


def chain_of(world, tokens):
    chain = TokenChain(world, CHUNKER)
    chain.extend(as_tokens(tokens))
    return chain


def test_a_prompt_is_hashed_once_however_much_is_remembered():
    """Long chunks have many lengths behind them, and this runs between an engine's steps."""

    class Read:
        def __init__(self, tokens):
            self.tokens, self.read = tokens, 0

        def __len__(self):
            return len(self.tokens)

        def __getitem__(self, part):
            self.read += len(self.tokens[part])
            return self.tokens[part]

    conversations, tokens = Conversations(), as_tokens(range(1000))
    for end in range(SHORTEST, 1000, 7):
        conversations.remember(b"world", SimpleNamespace(ends=[], keys=[], tokens=tokens[:end]), end)
    for asked, turn in ((tokens, end + 1), (tokens[::-1].copy(), 1)):
        chain = SimpleNamespace(ends=[], keys=[], tokens=Read(asked))
        assert conversations.turn(b"world", chain) == turn and chain.tokens.read <= 1000


class Machine(RuleBasedStateMachine):
    """Against a list of all prompts, which each is compared with."""

    limit = 6

    def __init__(self):
        super().__init__()
        self.real = Conversations(self.limit)
        self.naive = {}  # (world, tokens): turn; the one used last is last

    @rule(world=st.sampled_from([b"one", b"two"]), parts=PARTS, last=st.data(), turn=st.integers(1, 9))
    def remembers(self, world, parts, last, turn):
        tokens = self.tokens(parts, last)
        self.real.remember(world, chain_of(world, tokens), turn)
        if len(tokens) >= SHORTEST:
            self.naive.pop((world, tokens), None)
            self.naive[world, tokens] = turn
        if len(self.naive) > self.limit:
            self.naive.pop(next(iter(self.naive)))

    @rule(world=st.sampled_from([b"one", b"two"]), parts=PARTS, last=st.data())
    def asks(self, world, parts, last):
        tokens = self.tokens(parts, last)
        begun = [each for each in self.naive if each[0] == world and tokens[: len(each[1])] == each[1]]
        expected = 1
        if begun:
            longest = max(begun, key=lambda each: len(each[1]))
            turn = self.naive[longest] = self.naive.pop(longest)
            expected = turn if longest[1] == tokens else turn + 1
        assert self.real.turn(world, chain_of(world, tokens)) == expected

    def tokens(self, parts, data):
        """Some parts behind each other, or behind what is known."""
        known = [each[1] for each in self.naive]
        before = data.draw(st.sampled_from([(), *known])) if known else ()
        return before[:400] + tuple(token for part in parts for token in ALPHABET[part])

    @invariant()
    def books_agree(self):
        assert len(self.real) == len(self.naive)


def test_of_what_is_forgotten_nothing_is_left():
    conversations = Conversations(limit=6)
    worlds = [number.to_bytes(16, "big") for number in range(3000)]
    chains = [chain_of(world, text(number, 16 + number % MAX)) for number, world in enumerate(worlds)]

    def remember():
        for world, chain in zip(worlds, chains, strict=True):
            conversations.remember(world, chain, 1)

    assert grown(remember) < 20_000 and len(conversations) == 6


def test_against_a_list():
    run_state_machine_as_test(Machine, settings=settings(max_examples=60, stateful_step_count=25, deadline=None))
