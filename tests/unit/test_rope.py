"""Each attention layer's rotation is found in the model, and proven on the keys that its block computes."""

import pytest
import torch
from torch import nn

from ragkv.connectors.vllm.rope import rotations
from ragkv.errors import FusionError
from ragkv.kvstore.fusion.rotation import Rotation
from rotary_modules import HEAD, LLAMA3, REFUSED, SCHEMES, YARN, noise, rotary

HIDDEN, HEADS, LAYERS = 48, 2, 3
NAMES = [f"model.layers.{number}.self_attn.attn" for number in range(LAYERS)]
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Projection(nn.Linear):
    """With the two attributes that vLLM's linear layers have."""

    def __init__(self, dtype):
        super().__init__(HIDDEN, 3 * HEADS * HEAD, dtype=dtype)
        self.input_size, self.params_dtype = HIDDEN, dtype


class Attention(nn.Module):
    def __init__(self, head_size=HEAD):
        super().__init__()
        self.head_size = head_size

    def forward(self, query, key, value):
        raise AssertionError("attention does not run")


class Block(nn.Module):
    """An attention block as Llama's. `rope`: what it holds as rotary_emb."""

    def __init__(self, rope, dtype=torch.float32):
        super().__init__()
        self.qkv_proj, self.rotary_emb, self.attn = Projection(dtype), rope, Attention()

    def split(self, hidden_states):
        return self.qkv_proj(hidden_states).chunk(3, dim=-1)

    def forward(self, positions, hidden_states):
        query, key, value = self.split(hidden_states)
        query, key = self.rotary_emb(positions, query.contiguous(), key.contiguous())
        return self.attn(query, key, value)


class GPTJ(Block):
    """Other names and order of what it is given; keys by name, with their heads apart."""

    def forward(self, position_ids, hidden_states, residual=None, **more):
        query, key, value = self.split(hidden_states)
        query, key = self.rotary_emb(position_ids, query.contiguous(), key.contiguous())
        return self.attn(query=query, key=key.unflatten(-1, (HEADS, -1)), value=value)


class NormBefore(Block):
    """QK norm, as Qwen3's."""

    def forward(self, positions, hidden_states):
        query, key, value = self.split(hidden_states)
        key = nn.functional.rms_norm(key.unflatten(-1, (HEADS, -1)), (HEAD,)).flatten(1)
        key = key * noise(HEADS * HEAD).to(key.dtype)
        query, key = self.rotary_emb(positions, query.contiguous(), key)
        return self.attn(query, key, value)


class NormAfter(Block):
    """QK norm with weights behind the rotation: keys turned later are others."""

    def forward(self, positions, hidden_states):
        query, key, value = self.split(hidden_states)
        query, key = self.rotary_emb(positions, query.contiguous(), key.contiguous())
        return self.attn(query, key * (1 + 0.3 * noise(HEADS * HEAD)).to(key.dtype), value)


class NoPositions(Block):
    """Has a rotary embedding and does not use it, as the global layers of Cohere's and Exaone's models."""

    def forward(self, positions, hidden_states):
        return self.attn(*self.split(hidden_states))


class NoKeys(Block):
    """Shares the KV of another layer, as Gemma 3n's last layers."""

    def forward(self, positions, hidden_states):
        return self.attn(self.split(hidden_states)[0], None, None)


class Unreached(Block):
    def forward(self, positions, hidden_states):
        return hidden_states


class Unlike(Block):
    def forward(self, positions, hidden_states, sections):
        raise AssertionError("not called")


class NoPlace(Block):
    def forward(self, hidden_states):
        raise AssertionError("not called")


class Failing(Block):
    def forward(self, positions, hidden_states):
        raise TypeError("only 2 of them")


class Model(nn.Module):
    """`blocks` as model.layers.N.self_attn."""

    def __init__(self, *blocks):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for block in blocks:
            layer = nn.Module()
            layer.self_attn = block
            self.model.layers.append(layer)


def model(scheme="default", cls=Block, neox=True, dtype=torch.float32):
    rope = rotary(SCHEMES[scheme], neox, dtype)
    return Model(*(cls(rope, dtype) for _ in range(LAYERS)))


@TYPES
@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("cls", [Block, GPTJ, NormBefore])
@pytest.mark.parametrize("scheme", ["default", "partial", "llama3", "yarn"])
def test_layers_that_share_a_rotary_module_share_its_rotation(scheme, cls, neox, dtype):
    whole = model(scheme, cls, neox, dtype)
    found = rotations(whole, NAMES)
    assert found == [Rotation.of(rotary(SCHEMES[scheme], neox))] * LAYERS
    assert len({id(each) for each in found}) == 1


def test_equal_modules_share_one_rotation_and_others_do_not():
    ropes = [rotary(LLAMA3), rotary(YARN), rotary(LLAMA3, count=131000)]
    assert len(set(map(id, ropes))) == 3
    whole = Model(*map(Block, ropes))
    found = rotations(whole, [NAMES[2], NAMES[1], NAMES[0]])
    assert found[0] is found[2]
    assert found[0] == Rotation.of(ropes[0])
    assert found[1] == Rotation.of(ropes[1]) != found[0]


def test_a_layer_that_calls_itself_otherwise_than_its_path():
    whole = Model(Block(rotary(LLAMA3)), Block(rotary(YARN)))
    for number, layer in enumerate(whole.model.layers):
        layer.self_attn.attn.layer_name = f"language_model.{1 - number}.attn"
    found = rotations(whole, ["language_model.0.attn", "language_model.1.attn"])
    assert found == [Rotation.of(rotary(YARN)), Rotation.of(rotary(LLAMA3))]


def test_nothing_is_left_behind():
    whole = model(dtype=torch.bfloat16)
    rope = whole.model.layers[0].self_attn.rotary_emb
    table = rope.cos_sin_cache
    weights = {name: value.clone() for name, value in whole.state_dict().items()}
    rotations(whole, NAMES)
    assert rope.cos_sin_cache is table
    assert all(torch.equal(value, weights[name]) for name, value in whole.state_dict().items())
    with pytest.raises(AssertionError, match="attention does not run"):
        whole.model.layers[0].self_attn(torch.arange(3), noise(3, HIDDEN).bfloat16())


@TYPES
@pytest.mark.parametrize(
    "cls, text",
    [
        (NormAfter, "NormAfter: .* parts of a key turned"),
        (NoPositions, "NoPositions: .* parts of a key turned"),
        (NoKeys, "does not hand keys"),
        (Unreached, "does not hand keys"),
        (Unlike, "Unlike.forward is unlike others in sections"),
        (NoPlace, "NoPlace.forward is unlike others in positions"),
        (Failing, "cannot be tried: TypeError: only 2 of them"),
    ],
)
def test_blocks_whose_keys_do_not_turn_so_are_refused(cls, text, dtype):
    rope = rotary(SCHEMES["default"], dtype=dtype)
    whole = Model(Block(rope, dtype), cls(rope, dtype))
    rotations(whole, NAMES[:1])
    with pytest.raises(FusionError, match=f"layer {NAMES[1]}: .*{text}"):
        rotations(whole, NAMES[:2])
    with pytest.raises(AssertionError, match="does not run"):  # and no hook is left that would come before
        whole.model.layers[1].self_attn.attn(None, None, None)


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheme_that_is_not_supported_is_refused_with_its_layer(name):
    whole = Model(Block(rotary(SCHEMES["default"])), Block(rotary(REFUSED[name], count=4096)))
    with pytest.raises(FusionError, match=f"layer {NAMES[1]}: keys cannot be moved under {name}"):
        rotations(whole, NAMES[:2])


def test_a_layer_without_a_rotary_module_is_refused():
    whole = Model(Block(None))
    with pytest.raises(FusionError, match=f"layer {NAMES[0]}: 0 rotary embeddings; supported: 1"):
        rotations(whole, NAMES[:1])


def test_a_layer_with_two_rotary_modules_is_refused():
    block = Block(rotary(LLAMA3))
    block.rotary_emb_local = rotary(YARN)
    text = f"layer {NAMES[0]}: 2 rotary embeddings: Llama3RotaryEmbedding, YaRNScalingRotaryEmbedding"
    with pytest.raises(FusionError, match=text):
        rotations(Model(block), NAMES[:1])


def test_a_layer_that_is_not_there_is_refused():
    with pytest.raises(FusionError, match="layer other is not in the model"):
        rotations(model(), ["other"])


def test_a_layer_whose_heads_are_not_those_of_its_embedding_is_refused():
    """As under MLA, where the turning part is some of what is kept."""
    whole = model()
    whole.model.layers[0].self_attn.attn.head_size = 576
    with pytest.raises(FusionError, match="heads of 576 in attention, of 64 in its embedding"):
        rotations(whole, NAMES)


def test_a_block_without_a_projection_of_vllms_is_refused():
    whole = model()
    del whole.model.layers[0].self_attn.qkv_proj.params_dtype
    with pytest.raises(FusionError, match="Block has no projection"):
        rotations(whole, NAMES)
