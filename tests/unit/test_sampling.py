"""Samples of weights: what they find, in how many steps, and what they look at."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ragkv.connectors.vllm.fingerprint import fingerprint_model
from ragkv.connectors.vllm.messages import WeightsSample
from ragkv.connectors.vllm.sampling import LINE, LINES, PARTS, PASSES, Sampler
from ragkv.connectors.vllm.streams import Stream
from ragkv.connectors.vllm.weights import Rounds
from simulated_device import SimulatedStreams

CPU = torch.device("cpu")
BOUND = 256  # steps
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Model(torch.nn.Module):
    """Tensors of many kinds: tied, transposed, tiny, empty, of 1 to 8 bytes an element, strided."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        pick = torch.Generator().manual_seed(5)

        def weight(*shape):
            return torch.nn.Parameter(torch.randn(*shape, generator=pick).to(dtype) * 0.02)

        self.embed = weight(500, 48)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(48, 64) for _ in range(9))
        self.layers.to(dtype)
        self.head = self.embed
        self.turned = torch.nn.Parameter(weight(96, 40).detach().T)
        self.cut = torch.nn.Parameter(weight(64, 64).detach()[::2, ::3], requires_grad=False)
        self.scale, self.empty = weight(3), torch.nn.Parameter(torch.empty(0, dtype=dtype))
        self.register_buffer("packed", torch.randint(0, 255, (77, 31), generator=pick, dtype=torch.uint8))
        self.register_buffer("table", torch.randn(300, 8, generator=pick, dtype=torch.float64))

    def tensors(self):
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def steps_until_found(sampler, rounds, most=BOUND, change=None, tokens=1):
    """Steps of an engine, with a change behind its back in step `change`; steps from it until it is found."""
    for step in range(most):
        if step == 0 and change is not None:
            change()
        if number := rounds.question(tokens, waiting=False):
            begun = number
            sampler.begin()
        same = sampler.go_on(whole=False)
        if same is not None:
            rounds.hear(WeightsSample(begun, 0, same))
        if same is False:
            return step
    return None


@pytest.mark.parametrize("begun", [0, 1, 5, 63, 64, 100])
def test_a_training_step_is_found_within_the_bound(begun):
    model = Model()
    sampler, rounds = Sampler(model, CPU, Stream()), Rounds(1)
    assert steps_until_found(sampler, rounds, most=begun) is None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def train():
        (model.embed[:, :48] @ model.layers[3].weight.T).square().mean().backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()

    before = fingerprint_model(model)
    found = steps_until_found(sampler, rounds, change=train)
    assert fingerprint_model(model) != before and found is not None and found < BOUND


@pytest.mark.parametrize("name", [name for name, tensor in Model().tensors().items() if tensor.numel()])
def test_a_change_of_one_whole_tensor_is_found_within_the_bound(name):
    model = Model()
    sampler, rounds = Sampler(model, CPU, Stream()), Rounds(1)
    tensor = model.tensors()[name].data
    assert steps_until_found(sampler, rounds) is None, "nothing has changed"
    found = steps_until_found(sampler, rounds, change=lambda: tensor.copy_(tensor + 1))
    assert found is not None


@settings(deadline=None)
@given(st.data(), st.sampled_from([name for name, tensor in Model().tensors().items() if tensor.numel()]))
def test_the_full_look_finds_any_flipped_bit_at_any_place(data, name):
    model = Model()
    before = fingerprint_model(model)
    tensor = model.tensors()[name].data
    words = tensor.view(WORDS[tensor.element_size()])
    place = tuple(data.draw(st.integers(0, size - 1)) for size in words.shape)
    bits = 8 * tensor.element_size()
    flip = 1 << data.draw(st.integers(0, bits - 1))
    old = int(words[place])
    words[place] = old ^ (flip - (1 << bits) if flip >> (bits - 1) and bits > 8 else flip)
    assert fingerprint_model(model) != before
    words[place] = old
    assert fingerprint_model(model) == before


@pytest.mark.parametrize("name", ["embed", "turned", "cut", "packed", "scale"])
def test_a_tensor_that_is_replaced_by_its_equal_is_noticed(name):
    """What views show then is nobody's."""
    model = Model()
    sampler = Sampler(model, CPU, Stream())
    equal = model.tensors()[name].detach().clone()
    setattr(model, name, equal if name == "packed" else torch.nn.Parameter(equal, requires_grad=False))
    sampler.begin()
    assert sampler.go_on(whole=True) is False


@given(st.data())
def test_over_all_passes_every_run_of_a_small_tensor_has_its_turn(data):
    """And what is left behind the last run has the last pass."""
    length = data.draw(st.integers(1, LINES * (PASSES - 1) * LINE))
    model = torch.nn.Module()
    model.register_buffer("only", torch.zeros(length, dtype=torch.int16))
    sampler = Sampler(model, CPU, Stream())
    model.only[data.draw(st.integers(0, length - 1))] = 1
    answers = []
    for _ in range(PASSES):
        sampler.begin()
        answers.append(sampler.go_on(whole=True))
    assert False in answers


class Compared(TorchDispatchMode):
    """Bytes of what is compared."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.equal.default:
            self.bytes += args[0].nbytes
        return function(*args, **(kwargs or {}))


def test_a_round_costs_little_and_is_spread_over_steps():
    model = Model()
    sampler = Sampler(model, CPU, Stream())
    largest = max(t.element_size() for t in model.tensors().values())
    assert 0 < sampler.bytes <= sampler.tensors * LINES * LINE * largest
    rounds = []
    for _ in range(PASSES):
        sampler.begin()
        answers, steps = [], []
        for _ in range(PARTS + 3):
            with Compared() as compared:
                answers.append(sampler.go_on(whole=False))
            steps.append(compared.bytes)
        assert answers == [None] * (PARTS - 1) + [True] + [None] * 3
        assert max(steps) <= (1 + sampler.tensors // PARTS) * LINES * LINE * largest, "bytes a step"
        rounds.append(sum(steps))
    assert sampler.bytes in rounds and min(rounds) > 0.9 * sampler.bytes, "all tensors have their turn in each"
    big = torch.nn.Module()
    big.register_buffer("only", torch.zeros(10**6, dtype=torch.int16))
    assert Sampler(big, CPU, Stream()).bytes <= LINES * LINE * 2, "bytes a tensor, however large it is"


def test_a_round_that_is_given_up_leaves_no_answer():
    model = Model()
    sampler = Sampler(model, CPU, Stream())
    sampler.begin()
    assert sampler.go_on(whole=False) is None
    sampler.begin()
    assert [sampler.go_on(whole=False) for _ in range(PARTS)] == [None] * (PARTS - 1) + [True]
    assert sampler.go_on(whole=True) is None, "no round is under way"


@pytest.mark.parametrize("changed", [False, True])
def test_an_accelerators_answer_is_not_waited_for(changed):
    device = SimulatedStreams(lambda n: 0)
    model = Model()
    sampler = Sampler(model, CPU, device.compute)
    if changed:
        model.scale.data += 1
    sampler.begin()
    assert sampler.go_on(whole=True) is sampler.go_on(whole=True) is None, "it has not run"
    device.finish()
    assert sampler.go_on(whole=True) is not changed
    sampler.begin()
    assert sampler.go_on(whole=True) is None
    device.finish()
    assert sampler.go_on(whole=True) is not changed, "what differs once differs until the next look"


def test_a_device_is_told_to_compare_and_not_waited_for():
    """PyTorch's "meta" device refuses whatever the host would have to read."""
    parts = []

    class Unread(Stream):
        def submit(self, work):
            parts.append(work)
            if len(parts) <= PARTS:  # the last one fetches the answer
                work()

    meta = torch.device("meta")
    sampler = Sampler(Model().to(meta), meta, Unread())
    sampler.begin()
    assert sampler.go_on(whole=True) is True and len(parts) == PARTS + 1 and sampler.tensors
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.equal(*(torch.zeros(7, dtype=torch.int16, device=meta) for _ in range(2)))


def test_tensors_of_other_devices_are_left_out():
    model = Model()
    model.register_buffer("elsewhere", torch.empty(5, device="meta"))
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    sampler = Sampler(model, CPU, Stream())
    assert sampler.tensors == len([t for t in Model().tensors().values() if t.numel()])
