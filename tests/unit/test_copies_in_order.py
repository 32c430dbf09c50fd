"""Copies beside forwards, on a device that runs late: nothing is read or written too early or too late."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ragkv.connectors.vllm.streams import Event, Ticket
from simulated_device import SimulatedStreams
from simulated_engine import play

CHANCE = st.randoms(use_true_random=False)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(CHANCE)
def test_every_byte_is_right_in_any_order_that_streams_and_events_allow(chance):
    play(chance)


def one_half_for_both(mover):
    mover.staging = mover.staging[:1].expand(2, -1, -1)


def tickets_of_failures_are_done(mover):
    mover.ordered = lambda kind: Ticket(Event())


BROKEN = {
    "a load does not wait for the forwards before it": ({"load": ["wait"]}, None, "loaded|reads"),
    "a store does not wait for the forwards before it": ({"store": ["wait"]}, None, "was stored"),
    "forwards do not wait for a fenced store": ({"compute": ["wait"]}, None, "was stored"),
    "the point of the forwards before it is taken too early": ({"compute": ["record"]}, None, "stored|loaded"),
    "the ticket of a load is done too early": ({"load": ["record"]}, None, "was loaded"),
    "the ticket of a store is done too early": ({"store": ["record"]}, None, "stored|left alone"),
    "close does not wait for loads": ({"load": ["synchronize"]}, None, "under way after close"),
    "close does not wait for stores": ({"store": ["synchronize"]}, None, "under way after close"),
    "what raised half-way counts as over": ({}, tickets_of_failures_are_done, "left alone|reads|loaded"),
    "loads and stores share a staging buffer": ({}, one_half_for_both, "stored|loaded"),
}


def search(broken, tamper):
    """Play until something is wrong."""

    @settings(
        max_examples=1500,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CHANCE)
    def plays(chance):
        play(chance, broken, tamper)

    plays()


@pytest.mark.parametrize("what", BROKEN)
def test_what_a_mover_may_leave_out_is_found_by_its_wrong_bytes(what):
    broken, tamper, seen = BROKEN[what]
    with pytest.raises(AssertionError, match=seen):
        search(broken, tamper)


def test_the_device_runs_late_and_waits_for_events():
    device, seen = SimulatedStreams(lambda ready: ready - 1), []
    device.load.submit(lambda: seen.append("load"))
    event = device.load.record()
    device.compute.wait(event)
    device.compute.submit(lambda: seen.append("compute"))
    device.store.submit(lambda: seen.append("store"))
    assert not seen and not event.query()
    assert device.step() and seen == ["store"], "the last that can go on, so it was chosen"
    device.compute.synchronize()
    assert seen == ["store", "load", "compute"] and event.query() and not device.step()


def test_a_ring_of_waits_is_seen():
    device = SimulatedStreams(lambda ready: 0)
    first = device.load.record()
    device.load.queue.appendleft(device.store.record())
    device.store.queue.appendleft(first)
    with pytest.raises(AssertionError, match="ring"):
        device.finish()


class Harming(Ticket):
    """Of a store: when it has ended, one element of a page is wrong."""

    def __init__(self, ticket, page):
        self.ticket, self.page = ticket, page

    def query(self):
        ended = self.ticket.query()
        if ended:
            self.page.view(torch.int16)[-1, -1] ^= 1
        return ended


def test_one_wrong_element_of_one_layer_is_seen():
    def harms(mover):
        store = mover.store
        mover.store = lambda rows, slots: Harming(
            store(rows, slots), mover.tier.stretch(int(rows[0]) // mover.tier.page_tokens)
        )

    with pytest.raises(AssertionError, match="was stored"):
        search(None, harms)
