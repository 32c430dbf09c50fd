"""Fusion where it is easily wrong: names of blocks, what is copied as exact, what is only being computed."""

import hashlib

import numpy as np
import pytest

import toy_engine
import toy_vllm
from ragkv.config.settings import FusionSettings
from ragkv.connectors.vllm import fusing
from ragkv.connectors.vllm.fusing import QUESTION
from ragkv.kvstore.fusion.plan import make_plan
from ragkv.kvstore.gate import BELIEF, Gate
from toy_engine import BLOCK, BREAK, Engine, closing, text

NO = {"ragkv": {"fuse": False}}
SYSTEM = [*text(900, 40), BREAK]
PASSAGES = [[*text(100 + n, 90 + n), BREAK] for n in range(6)]
ASKED = text(901, QUESTION + 9)
WHOLE = [*SYSTEM, *PASSAGES[3], *PASSAGES[1], *PASSAGES[4], *ASKED]


def engine(keep=False, device=0, gate=None, cls=Engine):
    settings = FusionSettings(enabled=True, min_tokens=16, keep=keep)
    made = cls(pages=800, blocks=400, device=device, gate=gate, fusion=settings)
    for passage in PASSAGES:
        made.run(SYSTEM + passage, kv_transfer_params=NO)
    return made


def fusions(engine):
    return engine.fusions


def names_of(tokens, block, names=()):
    """What vLLM does: the names of all full blocks, each made from the one before; those in `names` stay."""
    names = list(names)
    for start in range(len(names) * block, len(tokens) // block * block, block):
        raw = (names[-1] if names else b"") + np.array(tokens[start : start + block], dtype="<i8").tobytes()
        names.append(hashlib.sha256(raw).digest())
    return names


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("before", [text(3, 3), SYSTEM + PASSAGES[3]], ids=["first block", "second block"])
def test_a_fused_part_within_the_prompts_last_block_gets_no_exact_name_when_the_answer_fills_it(
    monkeypatch, before, keep
):
    """128 tokens a block is vLLM's default on CPU."""
    for module in (toy_engine, toy_vllm):
        monkeypatch.setattr(module, "BLOCK", 128)
    with closing(engine(keep=keep)) as made:
        whole = before + PASSAGES[0][:80] + text(902, QUESTION)
        request = made.request(whole, block_hashes=names_of(whole, 128))
        for _ in range(128):
            made.step(sample=text(7, 128))
        if fusions(made):  # not to fuse is as good
            first = fusions(made)[0].start // 128
            names = names_of(request.all_token_ids, 128, request.block_hashes)
            exact = names_of(request.all_token_ids, 128)
            assert names[first] != exact[first] or made.knows_as_fused(names[first])


class Kept(Engine):
    """vLLM's own hits are of fused blocks from token `wrong` on."""

    wrong, strict = None, False

    def _admit(self, request, local, hits):
        taken = super()._admit(request, local, hits)
        if request.blocks and local and self.wrong is not None:
            self._write(self._slots(request, self.wrong, local // BLOCK * BLOCK), lambda _: 13)
        return taken


def test_what_vllms_cache_has_of_fused_kv_is_not_copied_to_the_device_tier_as_exact():
    with closing(engine(keep=True, device=400, cls=Kept)) as made:
        names = names_of(WHOLE, BLOCK)
        made.run(WHOLE, block_hashes=list(names))
        start = fusions(made)[0].start
        made.run(WHOLE, kv_transfer_params=NO)  # exact, and stored
        made.wrong, local = start, (start + 100) // BLOCK * BLOCK
        for _ in range(3):  # it becomes hot
            assert made.run(WHOLE, local=local, block_hashes=list(names), kv_transfer_params=NO)
        made.wrong = None
        made.run(WHOLE, kv_transfer_params=NO)  # the toy checks what this loads


def test_a_lookup_that_fails_leaves_nothing_fused_behind_for_the_store():
    with closing(engine(keep=True, cls=Kept)) as made:
        names = names_of(WHOLE, BLOCK)
        made.run(WHOLE, block_hashes=list(names))
        start = made.wrong = fusions(made)[0].start
        lookup, match = made.side.lookup, made.memory.match

        def guarded(request, computed):  # as the connector
            made.memory.match = fails
            try:
                return lookup(request, computed)
            except OSError:
                return 0
            finally:
                made.memory.match = match

        def fails(*_):
            raise OSError("no match")

        made.side.lookup = guarded
        longer = [*WHOLE, *text(8, 40)]
        made.run(longer, local=len(names) * BLOCK, block_hashes=list(names), kv_transfer_params=NO)
        made.side.lookup, made.wrong = lookup, None
        assert made.run(longer, kv_transfer_params=NO) <= start, "the toy checks what this loads"


def test_a_plan_is_forgotten_when_the_next_one_fails(monkeypatch):
    plans, moved = [], []

    def noted(*given):
        plans.append(make_plan(*given))
        return plans[-1]

    def fails(*_):
        raise OSError("no memory")

    with closing(engine()) as made:
        prepare, free, made.free = made.cache.prepare_moved_load, made.free, []
        monkeypatch.setattr(
            made.cache, "prepare_moved_load", lambda pieces: moved.extend(pieces) or prepare(pieces)
        )
        monkeypatch.setattr(fusing, "make_plan", noted)
        made.request(WHOLE)
        made.step()  # it is looked up, and there are no blocks for it
        gone = plans[0].pieces[0].chunk
        made.memory.forget([gone], "expired")
        monkeypatch.setattr(fusing, "make_plan", fails)
        with pytest.raises(OSError, match="no memory"):
            made.step()  # the connector says: nothing
        monkeypatch.setattr(fusing, "make_plan", noted)
        made.free = free
        assert made.step(), "it is taken up"
        assert all(piece.chunk is not gone for piece in moved)


def test_what_is_too_slow_to_load_is_not_loaded_to_be_fused():
    gate = Gate()
    for tokens in (50, 100, 200, 500, 1000) * BELIEF:
        gate.prefill.note(tokens, 0.001 * tokens)
        gate.copy.note(tokens, 0.005 * tokens)
        gate.fuse.note(tokens, 0.001 * tokens)
    with closing(engine(gate=gate)) as made:
        for _ in range(3):  # of many declined ones one is tried all the same
            made.run(WHOLE)
        assert not fusions(made)
