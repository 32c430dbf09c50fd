"""What is sent to a device, and the streams of a CPU."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from ragkv.connectors.vllm.streams import ALIGNMENT, Packed, make_streams

CPU = torch.device("cpu")
ARRAYS = st.lists(
    arrays.arrays(st.sampled_from([np.int64, np.int32, np.uint8]), arrays.array_shapes(max_dims=2, min_side=0)),
    min_size=1,
    max_size=5,
)


@given(ARRAYS)
def test_arrays_arrive_as_they_were_each_well_aligned(given_arrays):
    arrived = Packed(given_arrays, CPU).on_device()
    for was, now in zip(given_arrays, arrived, strict=True):
        assert now.numpy().dtype == was.dtype and np.array_equal(now.numpy(), was)
        assert now.data_ptr() % ALIGNMENT == 0 or not was.size


def test_arrays_in_any_strides_and_changed_afterwards():
    given_array = np.arange(20, dtype=np.int64).reshape(4, 5)
    packed = Packed([given_array.T, given_array[:, 1]], CPU)
    wanted = given_array.T.copy(), given_array[:, 1].copy()
    given_array[:] = 0
    assert all(np.array_equal(now.numpy(), was) for now, was in zip(packed.on_device(), wanted, strict=True))


def test_a_cpu_does_everything_at_once():
    streams, seen = make_streams(CPU), []
    for stream in (streams.load, streams.store, streams.compute):
        stream.wait(streams.compute.record())
        stream.submit(lambda: seen.append(1))
        event = stream.record()
        assert event.query()
        event.synchronize()
        stream.synchronize()
    assert len(seen) == 3
