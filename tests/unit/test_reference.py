"""The reference that fusion is held against: itself held against transformers, then against what fusing means."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reference import Llama, divergence

TOLERANCE = 1e-5
TOKENS = [3, 41, 7, 7, 19, 88, 2, 60, 33, 5, 17, 90, 11, 4, 64, 23]


def tiny(tied):
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=12,
        initializer_range=0.2,  # large, so that attention is far from even
        rms_norm_eps=1e-3,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    torch.manual_seed(4)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def theirs():
    return tiny(tied=False)


@pytest.fixture(scope="module")
def ours(theirs):
    return Llama(theirs.config.to_dict(), theirs.state_dict())


def elsewhere(model, tokens, at=5):
    """K and V of these tokens as computed behind others, keys turned back to where `tokens` begin."""
    other = [50 + number for number in range(at)]
    state = model.prefill([*other, *tokens])
    shifts = torch.full((len(tokens),), -at)
    return model.turn(state.keys[:, at:], shifts), state.values[:, at:]


@pytest.mark.parametrize("tied", [False, True])
def test_prefill_is_that_of_transformers(tied, tmp_path):
    theirs = tiny(tied)
    theirs.save_pretrained(tmp_path)
    ours = Llama.load(tmp_path).prefill(TOKENS)
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS]), use_cache=True)
    torch.testing.assert_close(ours.logits, expected.logits[0], atol=TOLERANCE, rtol=0)
    for layer, cached in enumerate(expected.past_key_values.layers):
        torch.testing.assert_close(ours.keys[layer], cached.keys[0].transpose(0, 1), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(ours.values[layer], cached.values[0].transpose(0, 1), atol=TOLERANCE, rtol=0)


def test_fusing_everything_is_prefill(ours):
    full = ours.prefill(TOKENS)
    fused = ours.fuse(*elsewhere(ours, TOKENS), TOKENS, range(len(TOKENS)))
    for name in ("logits", "keys", "values", "queries"):
        assert torch.equal(getattr(fused, name), getattr(full, name)), name


def test_fusing_nothing_keeps_what_is_reused(ours):
    keys, values = elsewhere(ours, TOKENS)
    fused = ours.fuse(keys, values, TOKENS, [])
    assert torch.equal(fused.keys, keys) and torch.equal(fused.values, values)
    assert fused.logits.shape == (0, 97)


def test_exact_kv_recomputed_anywhere_is_exact(ours):
    full = ours.prefill(TOKENS)
    selected = [1, 2, 6, 9, 10, 15]
    fused = ours.fuse(full.keys, full.values, TOKENS, selected)
    torch.testing.assert_close(fused.keys, full.keys, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(fused.values, full.values, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(fused.logits, full.logits[selected], atol=TOLERANCE, rtol=0)


def test_two_ascending_forwards_are_one(ours):
    reused = elsewhere(ours, TOKENS)
    selected = [0, 1, 4, 7, 8, 12, 15]
    once = ours.fuse(*reused, TOKENS, selected)
    first = ours.fuse(*reused, TOKENS, selected[:3])
    second = ours.fuse(first.keys, first.values, TOKENS, selected[3:])
    torch.testing.assert_close(second.keys, once.keys, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(second.values, once.values, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(torch.cat([first.logits, second.logits]), once.logits, atol=TOLERANCE, rtol=0)


def test_two_descending_forwards_are_not_one(ours):
    reused = elsewhere(ours, TOKENS)
    once = ours.fuse(*reused, TOKENS, [1, 9])
    late = ours.fuse(*reused, TOKENS, [9])
    early = ours.fuse(late.keys, late.values, TOKENS, [1])
    assert (early.keys[:, 9] - once.keys[:, 9]).abs().max() > 100 * TOLERANCE


def test_only_selected_positions_change(ours):
    keys, values = elsewhere(ours, TOKENS)
    fused = ours.fuse(keys, values, TOKENS, [3, 8])
    kept = [position for position in range(len(TOKENS)) if position not in (3, 8)]
    assert torch.equal(fused.keys[:, kept], keys[:, kept])
    assert torch.equal(fused.values[:, kept], values[:, kept])
    for position in (3, 8):
        assert not torch.allclose(fused.values[1:, position], values[1:, position], atol=1e-3)


def test_a_selected_token_sees_nothing_after_it(ours):
    keys, values = elsewhere(ours, TOKENS)
    fused = ours.fuse(keys, values, TOKENS, [6])
    keys, values = keys.clone(), values.clone()
    keys[:, 7:], values[:, 7:] = 9.0, -9.0
    assert torch.equal(ours.fuse(keys, values, TOKENS, [6]).logits, fused.logits)


def test_reused_keys_of_the_first_layer_are_exact_once_turned(ours):
    full = ours.prefill(TOKENS)
    keys, values = elsewhere(ours, TOKENS)
    torch.testing.assert_close(keys[0], full.keys[0], atol=TOLERANCE, rtol=0)
    assert (values[1] - full.values[1]).abs().max() > 100 * TOLERANCE


def test_the_first_layers_only(ours):
    full = ours.prefill(TOKENS)
    early = ours.forward(*elsewhere(ours, TOKENS), TOKENS, range(len(TOKENS)), layers=2)
    assert torch.equal(early.keys[:2], full.keys[:2])
    assert len(early.queries) == 2


def test_divergence():
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.0, 0.0]])
    assert divergence(logits, logits + 5) == pytest.approx(0, abs=1e-12)
    full, other = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert divergence(full, other) == pytest.approx(0.5 * (torch.tensor(0.25 / 0.09).log().item()), rel=1e-6)


def test_scaled_positions_are_refused(theirs):
    config = theirs.config.to_dict() | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0}}
    with pytest.raises(ValueError, match="without scaling"):
        Llama(config, theirs.state_dict())
