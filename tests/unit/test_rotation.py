"""Turned keys are the ones that vLLM's own modules make at the new positions."""

import importlib
import inspect
import math
import pkgutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.model_executor.layers import rotary_embedding

from ragkv.errors import FusionError
from ragkv.kvstore.fusion.rotation import Rotation, check
from rotary_modules import HEAD, LLAMA3, REFUSED, SCHEMES, YARN, keys_at, noise, rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
EVERY = pytest.mark.parametrize("scheme", SCHEMES)
STYLES = pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def places(count, seed, highest=131072):
    return torch.randint(highest, (count,), generator=torch.Generator().manual_seed(seed))


def worst(turned, wanted):
    """The largest difference, in parts of the mean length of an element."""
    return float((turned.float() - wanted.float()).abs().max() / wanted.float().square().mean().sqrt())


@EVERY
@STYLES
def test_turned_keys_are_those_of_the_engine_at_the_new_positions(scheme, neox):
    module = rotary(SCHEMES[scheme], neox)
    rotation = Rotation.of(module)
    keys, start, end = noise(60, 3, HEAD), places(60, 1), places(60, 2)
    turned = rotation.turn(keys_at(module, keys, start), end - start)
    assert worst(turned, keys_at(module, keys, end)) < 0.03, "the engine's angles are float32: 131,072 * 2^-24"
    short, near = places(60, 3, 2000), places(60, 4, 2000)
    turned = rotation.turn(keys_at(module, keys, short), near - short)
    assert worst(turned, keys_at(module, keys, near)) < 1e-3
    check(module, rotation)


@EVERY
@STYLES
def test_a_shift_of_100_000_is_as_exact_as_a_short_one(scheme, neox):
    """Against float64: the engine's own angles are good to 0.004 there."""
    module = rotary(SCHEMES[scheme], neox)
    rotation = Rotation.of(module)
    keys = noise(8, 2, HEAD)
    turned = rotation.turn(keys, torch.full((8,), 100_000))
    first, second = (part.double() for part in rotation.pairs(keys))
    angles = 100_000 * torch.tensor(rotation.frequencies, dtype=torch.float64)
    exact = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    got = torch.complex(*(part.double() for part in rotation.pairs(turned)))
    assert float((got - exact).abs().max()) < 2e-6


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_keys_and_tables_of_16_bits(scheme, dtype):
    module = rotary(SCHEMES[scheme], dtype=dtype)
    assert module.cos_sin_cache.dtype == dtype
    rotation = Rotation.of(module)
    assert rotation == Rotation.of(rotary(SCHEMES[scheme])), "frequencies do not come out of the table"
    keys, start, end = noise(60, 3, HEAD).to(dtype), places(60, 1), places(60, 2)
    turned = rotation.turn(keys_at(module, keys, start), end - start)
    assert turned.dtype == dtype
    assert worst(turned, keys_at(module, keys, end)) < 0.03 + 8 * torch.finfo(dtype).eps
    check(module, rotation)
    assert module.cos_sin_cache.dtype == dtype, "the engine's table is not converted"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@STYLES
def test_keys_of_8_bits(dtype, neox):
    module = rotary(SCHEMES["default"], neox)
    start, end = places(60, 1), places(60, 2)
    keys = noise(60, 3, HEAD)
    stored = keys_at(module, keys, start).to(dtype)
    turned = Rotation.of(module).turn(stored, end - start)
    assert turned.dtype == dtype
    exact = Rotation.of(module).turn(stored.float(), end - start)
    assert torch.equal(bits(turned), bits(exact.to(dtype))), "rounded once, at the end"
    off = (turned.float() - keys_at(module, keys, end)).square().mean().sqrt()
    assert off < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_keys_of_8_bits_saturate(dtype):
    most = torch.finfo(dtype).max
    turned = Rotation((math.pi / 4,), True).turn(
        torch.tensor([[[most, most], [-most, -most]]]).to(dtype), torch.tensor([1])
    )
    assert turned.float()[0, :, 1].tolist() == [most, -most], "not NaN nor infinite"


@EVERY
def test_the_rotation_is_the_schemes_own(scheme):
    """`check` compares with the module itself; these are the published formulas."""
    parameters = SCHEMES[scheme]
    turning = int(HEAD * parameters.get("partial_rotary_factor", 1))
    rotation = Rotation.of(rotary(parameters))
    assert rotation.rotary_dim == turning
    theta = parameters.get("rope_theta", 10000.0)
    plain = [theta ** (-2 * i / turning) for i in range(turning // 2)]
    factor = parameters.get("factor", 1.0)
    if scheme in ("default", "theta", "partial"):
        wanted = plain
    elif scheme == "linear":
        wanted = [each / factor for each in plain]
    elif scheme == "ntk":
        base = theta * factor
        wanted = [base ** (-2 * i / turning) / factor ** (2 / turning) for i in range(turning // 2)]
    else:  # of several parts: the fastest pair is untouched, the slowest is stretched by the whole factor
        assert rotation.frequencies[0] == pytest.approx(1.0, rel=0.1)
        assert rotation.frequencies[-1] == pytest.approx(plain[-1] / factor, rel=1e-5)
        return
    assert rotation.frequencies == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@STYLES
def test_rows_that_do_not_move_come_back_bit_by_bit(dtype, neox):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 6e-8, -1.0])
    keys = noise(6, 2, HEAD)
    keys[:, :, : len(special)] = special
    keys = keys.to(dtype)
    shifts = torch.tensor([0, 5, 0, -7, 0, 5])
    turned = Rotation.of(rotary(SCHEMES["default"], neox)).turn(keys, shifts)
    assert torch.equal(bits(turned[shifts == 0]), bits(keys[shifts == 0]))
    assert not any(torch.equal(bits(turned[row]), bits(keys[row])) for row in (1, 3, 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifts", [[0, 0, 0], [3, 0, 3], [3, 3, 3]])
def test_what_is_given_stays_as_it_is(dtype, shifts):
    keys = noise(3, 2, HEAD).to(dtype)
    before = keys.clone()
    turned = Rotation.of(rotary(SCHEMES["default"])).turn(keys, torch.tensor(shifts))
    assert torch.equal(bits(keys), bits(before))
    assert turned.data_ptr() != keys.data_ptr()


@pytest.mark.parametrize("scheme", ["partial", "yarn_partial"])
@STYLES
def test_elements_beyond_rotary_dim_stay(scheme, neox):
    rotation = Rotation.of(rotary(SCHEMES[scheme], neox))
    keys = noise(20, 2, HEAD)
    turned = rotation.turn(keys, places(20, 1) + 1)
    assert torch.equal(turned[..., rotation.rotary_dim :], keys[..., rotation.rotary_dim :])
    assert (turned[..., : rotation.rotary_dim] != keys[..., : rotation.rotary_dim]).float().mean() > 0.9


@pytest.mark.parametrize("scheme", ["yarn", "yarn_attention"])
def test_the_attention_factor_of_yarn_is_not_applied_again(scheme):
    module = rotary(SCHEMES[scheme])
    keys = noise(40, 2, HEAD)
    placed = keys_at(module, keys, places(40, 1))
    assert float(placed.norm() / keys.norm()) == pytest.approx(module.mscale, rel=1e-3)
    assert module.mscale > 1.2
    turned = Rotation.of(module).turn(placed, places(40, 2) - places(40, 1))
    assert turned.norm(dim=-1) == pytest.approx(placed.norm(dim=-1), rel=1e-5)


@given(
    tokens=st.integers(0, 9),
    heads=st.integers(1, 4),
    pairs=st.integers(1, 8),
    still=st.integers(0, 5),
    neox=st.booleans(),
    data=st.data(),
)
def test_two_turns_are_one_by_their_sum(tokens, heads, pairs, still, neox, data):
    shift = st.integers(-200_000, 200_000)
    a, b = (
        torch.tensor(data.draw(st.lists(shift, min_size=tokens, max_size=tokens)), dtype=torch.int64) for _ in "ab"
    )
    frequencies = data.draw(st.lists(st.floats(1e-7, 1.0), min_size=pairs, max_size=pairs))
    rotation = Rotation(tuple(frequencies), neox)
    keys = noise(tokens, heads, 2 * pairs + still)
    once, twice = rotation.turn(keys, a + b), rotation.turn(rotation.turn(keys, a), b)
    assert once.shape == keys.shape
    assert torch.allclose(once, twice, atol=1e-5)
    assert torch.allclose(once.norm(dim=-1), keys.norm(dim=-1), atol=1e-5)
    back = rotation.turn(once, -(a + b))
    assert torch.allclose(back, keys, atol=1e-5)
    rows = [rotation.turn(keys[i : i + 1], (a + b)[i : i + 1]) for i in range(tokens)]
    assert torch.equal(torch.cat([keys[:0], *rows]), once), "a row does not depend on the others"


def test_keys_in_any_strides():
    keys = noise(2, 5, HEAD).transpose(0, 1)
    rotation = Rotation.of(rotary(SCHEMES["default"]))
    for shifts in (torch.tensor([1, 0, 2, 0, 3]), torch.arange(1, 6)):
        assert torch.equal(rotation.turn(keys, shifts), rotation.turn(keys.contiguous(), shifts))


@pytest.mark.parametrize("name", REFUSED)
def test_schemes_that_cannot_be_moved_are_refused_by_name(name):
    parameters = REFUSED[name]
    module = rotary(parameters, count=4096)
    assert type(module).__name__ == name
    with pytest.raises(FusionError, match=f"under {name}; supported: RotaryEmbedding, Linear"):
        Rotation.of(module)


def all_classes():
    for found in pkgutil.iter_modules(rotary_embedding.__path__, rotary_embedding.__name__ + "."):
        for name, cls in inspect.getmembers(importlib.import_module(found.name), inspect.isclass):
            if "Rotary" in name and name != "ApplyRotaryEmb":
                yield name, cls


def test_of_all_classes_of_vllm_just_five_are_supported():
    """Each of the others, subclasses of the five among them, has a forward or a table of its own."""
    classes = dict(all_classes())
    supported = {"RotaryEmbedding"} | {f"{name}RotaryEmbedding" for name in ("LinearScaling", "Llama3")}
    supported |= {f"{name}ScalingRotaryEmbedding" for name in ("NTK", "YaRN")}
    others = classes.keys() - supported
    assert {"Phi3LongRoPEScaledRotaryEmbedding", "FourierRotaryEmbedding", "DualChunkRotaryEmbedding"} < others
    assert len(classes) == len(others) + 5
    for name in others:
        with pytest.raises(FusionError, match=f"under {name}; supported"):
            Rotation.of(object.__new__(classes[name]))


def test_linear_scaling_by_several_factors_is_refused():
    module = rotary(SCHEMES["linear"] | {"factor": (2.0, 4.0)}, count=1024)
    with pytest.raises(FusionError, match="2 scaling factors"):
        Rotation.of(module)


def wrong_rotations(parameters):
    right = Rotation.of(rotary(parameters))
    yield Rotation(right.frequencies, not right.is_neox_style)
    yield Rotation(tuple(-each for each in right.frequencies), right.is_neox_style)
    yield Rotation(tuple(each * 1.001 for each in right.frequencies), right.is_neox_style)
    yield Rotation(right.frequencies[:-1], right.is_neox_style)
    for pair in (0, len(right.frequencies) // 2, len(right.frequencies) - 1):
        changed = list(right.frequencies)
        changed[pair] *= 8.0  # as if a factor had been forgotten
        yield Rotation(tuple(changed), right.is_neox_style)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", [SCHEMES["default"], LLAMA3, YARN], ids=["default", "llama3", "yarn"])
def test_a_wrong_rotation_does_not_pass_the_check(parameters, dtype):
    module = rotary(parameters, dtype=dtype)
    for wrong in wrong_rotations(parameters):
        with pytest.raises(FusionError, match=type(module).__name__):
            check(module, wrong)


def test_a_table_that_is_not_the_modules_own_formula_does_not_pass_the_check(monkeypatch):
    module = rotary(SCHEMES["default"], count=3001)
    rotation = Rotation.of(module)
    check(module, rotation)
    monkeypatch.setattr(module, "cos_sin_cache", torch.roll(module.cos_sin_cache, 1, dims=1))
    with pytest.raises(FusionError, match="RotaryEmbedding"):
        check(module, rotation)
