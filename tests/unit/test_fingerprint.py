"""The fingerprint of a model: the same for the same weights, however they lie; another for any other bit."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ragkv.connectors.vllm import fingerprint
from ragkv.connectors.vllm.fingerprint import CHUNK, REMOVED, fingerprint_model, fingerprint_tensors
from ragkv.errors import RagKVError

BYTES = 8 * CHUNK
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.int8, torch.bool, torch.int64, torch.float8_e4m3fn)


def raw(seed, size):
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def flipped(tensor, bit):
    """A copy of which one bit is another."""
    copy = tensor.clone()
    flat = copy.view(-1).view(torch.uint8)
    flat[bit // 8] ^= 1 << bit % 8
    return copy


def of(tensor, name="w"):
    return fingerprint_tensors({name: tensor})


class Model(torch.nn.Module):
    def __init__(self, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = torch.nn.Linear(30, 50, dtype=dtype), torch.nn.Linear(50, 7, dtype=dtype)
        self.register_buffer("table", torch.randn(11, 3))
        self.register_buffer("hidden", torch.arange(5), persistent=False)


# --- what changes it ---


@pytest.mark.parametrize("size", [1, 7, 8, 9, 4096, BYTES - 3, BYTES, BYTES + 5, 3 * BYTES + 1])
def test_any_bit_changes_it(size):
    tensor, pick = raw(size, size), random.Random(size)
    known = of(tensor)
    places = {0, 8 * size - 1, 63 % (8 * size), *(pick.randrange(8 * size) for _ in range(12))}
    assert all(of(flipped(tensor, bit)) != known for bit in places)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_two_bits_change_it(data):
    """The highest bits of two words cancel in a sum of multiples; here they must not."""
    size = data.draw(st.sampled_from([64, 1000, BYTES + 64]))
    word = st.integers(0, size // 8 - 1)
    one, two = data.draw(st.tuples(word, word).filter(lambda pair: pair[0] != pair[1]))
    bits = data.draw(st.sampled_from([(63, 63), (31, 31), (0, 0), (62, 63), (7, 39)]))
    tensor = raw(3, size)
    assert of(flipped(flipped(tensor, 64 * one + bits[0]), 64 * two + bits[1])) != of(tensor)


@given(st.lists(st.integers(0, 7), min_size=2, max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_words_counts(words, pick):
    shuffled = list(words)
    pick.shuffle(shuffled)
    same = of(torch.tensor(words)) == of(torch.tensor(shuffled))
    assert same == (words == shuffled)


def test_chunks_that_change_places_are_another_tensor():
    first, second = raw(1, BYTES), raw(2, BYTES)
    assert of(torch.cat([first, second])) != of(torch.cat([second, first]))
    assert of(torch.zeros(2 * BYTES, dtype=torch.uint8)) != of(torch.zeros(BYTES, dtype=torch.uint8))


def test_negated_weights_are_others():
    """Only highest bits differ, in every element."""
    tensor = torch.randn(5000)
    assert of(tensor) != of(-tensor) and of(tensor.bfloat16()) != of(-tensor.bfloat16())


def test_names_shapes_and_dtypes_count():
    tensor = torch.zeros(4, 6)
    known = of(tensor)
    assert of(tensor, "v") != known
    assert of(tensor.view(6, 4)) != known
    assert of(tensor.view(torch.int32)) != known
    assert fingerprint_tensors({"w": tensor, "empty": torch.empty(0)}) != known
    assert fingerprint_tensors({"a": torch.ones(2), "b": torch.zeros(2)}) != fingerprint_tensors(
        {"a": torch.zeros(2), "b": torch.ones(2)}
    )


@pytest.mark.parametrize("name", ["first.weight", "second.bias", "table", "hidden"])
def test_every_parameter_and_buffer_counts(name):
    model = Model()
    known = fingerprint_model(model)
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    with torch.no_grad():
        kept = tensor.clone()
        tensor.copy_(flipped(tensor, 8 * tensor.element_size() * (tensor.numel() - 1)))
        assert fingerprint_model(model) != known
        tensor.copy_(kept)
    assert fingerprint_model(model) == known


# --- what does not ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_count(dtype):
    rows, columns = 300, 800
    size = torch.empty(0, dtype=dtype).element_size()
    data = raw(5, rows * columns * size)
    straight = (data.view(dtype) if dtype is not torch.bool else data > 127).view(rows, columns)
    crossed = torch.empty(columns, rows, dtype=dtype).t()
    crossed.copy_(straight)
    holes = torch.empty(rows, 2 * columns, dtype=dtype)[:, ::2]
    holes.copy_(straight)
    shifted = torch.empty(rows * columns + 1, dtype=dtype)[1:].view(rows, columns)
    shifted.copy_(straight)
    assert {of(each) for each in (straight, crossed, holes, shifted)} == {of(straight)}


def test_pieces_of_a_strided_tensor_meet_at_any_place():
    """Rows that are no whole words, over several chunks; and one row that is more than a chunk."""
    for shape in ((3, 7, 2 * BYTES // 20 + 1), (BYTES // 5 + 1, 3, 7), (2, 3 * BYTES)):
        straight = raw(9, torch.Size(shape).numel()).view(shape)
        strided = torch.empty(shape[::-1], dtype=torch.uint8).permute(*range(len(shape))[::-1])
        strided.copy_(straight)
        assert not strided.is_contiguous() and of(strided) == of(straight)


def test_sharing_and_order_do_not_count():
    shared, apart = Model(), Model()
    shared.third, apart.third = shared.first, torch.nn.Linear(30, 50)
    apart.third.load_state_dict(apart.first.state_dict())
    assert fingerprint_model(shared) == fingerprint_model(apart)
    tensors = dict(apart.named_parameters())
    assert fingerprint_tensors(tensors) == fingerprint_tensors(dict(reversed(tensors.items())))
    with torch.no_grad():
        apart.third.bias[3] += 1
    assert fingerprint_model(shared) != fingerprint_model(apart)


def test_the_number_of_chunks_at_once_does_not_count(monkeypatch):
    """As on an accelerator, where many are taken at once."""
    tensor = raw(4, 5 * BYTES + 77)
    known = of(tensor)
    monkeypatch.setattr(fingerprint, "BATCH", {})
    monkeypatch.setattr(fingerprint, "ELSEWHERE", 3)
    assert of(tensor) == known


def test_it_is_the_same_in_every_process():
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for each in model.parameters():
            each.copy_(torch.arange(each.numel()).view_as(each))
    assert fingerprint_model(model).hex() == "1dc0d3e446547e87d7c594bf3146a28f"


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5)])
def test_small_tensors(shape):
    assert of(torch.zeros(shape)) != of(torch.zeros(2))


# --- weights that vLLM's CPU build packs away ---


def test_a_packed_weight_counts_by_what_was_noted():
    seen = []
    for seed in (0, 1, 0):
        model = Model(seed)
        weight = model.first.weight.detach()
        setattr(model.first, REMOVED, of(weight, "weight"))
        model.first.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        for other in (model.second.weight, model.first.bias, model.second.bias, model.table):
            other.data.zero_()
        seen.append(fingerprint_model(model))
    assert seen[0] == seen[2] != seen[1]


def test_a_weight_that_nobody_noted_is_not_taken_for_none():
    model = Model()
    model.first.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
    with pytest.raises(RagKVError, match="the weight of first was packed away"):
        fingerprint_model(model)


def test_vllms_packing_is_watched(monkeypatch):
    from vllm.model_executor.layers import utils

    def pack(layer, remove_weight):
        if remove_weight:
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", pack)
    fingerprint.watch_packing()
    once = utils.dispatch_cpu_unquantized_gemm
    fingerprint.watch_packing()
    assert utils.dispatch_cpu_unquantized_gemm is once is not pack
    first, second = Model(0), Model(1)
    kept = fingerprint_model(first)
    for model in (first, second):
        once(model.first, remove_weight=False)
        assert not hasattr(model.first, REMOVED)
        once(model.first, remove_weight=True)
    assert first.first.weight.numel() == 0 and fingerprint_model(first) not in (kept, fingerprint_model(second))


class Allocations(TorchDispatchMode):
    """The largest piece of memory that operations gave, but for some tensor's own."""

    def __init__(self, but):
        super().__init__()
        self._but, self.most = but.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        for each in given if isinstance(given, tuple | list) else (given,):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() != self._but:
                self.most = max(self.most, each.untyped_storage().nbytes())
        return given


@pytest.mark.parametrize("strided", [False, True])
def test_no_copy_is_larger_than_a_chunk(strided):
    tensor = torch.zeros(1000, 9 * CHUNK // 1000, dtype=torch.int64)
    tensor = tensor.t() if strided else tensor
    with Allocations(tensor) as seen:
        of(tensor)
    assert 0 < seen.most <= BYTES
