"""A device that runs late: streams whose work waits in queues until `step`, and then in any order that the order
of each stream and the events between them allow. `choose(n)` decides, below n."""

from collections import deque


class SimulatedEvent:
    def __init__(self, device):
        self._device, self.over = device, False

    def query(self):
        return self.over

    def synchronize(self):
        while not self.over:
            assert self._device.step(), "an event that never comes"

    def since(self, start):
        """One thing done is a second."""
        return self.at - start.at


class SimulatedStream:
    def __init__(self, device):
        self._device, self.queue = device, deque()

    def submit(self, work):
        self.queue.append(work)

    def record(self):
        event = SimulatedEvent(self._device)

        def reach():
            event.over, event.at = True, self._device.done

        self.queue.append(reach)
        return event

    def wait(self, event):
        self.queue.append(event)

    def synchronize(self):
        self.record().synchronize()

    def can_go_on(self):
        """Work at its head, and not an event that is still to come."""
        while self.queue and isinstance(self.queue[0], SimulatedEvent) and self.queue[0].over:
            self.queue.popleft()
        return bool(self.queue) and not isinstance(self.queue[0], SimulatedEvent)


class SimulatedStreams:
    def __init__(self, choose):
        self._choose, self.done = choose, 0
        self.compute, self.load, self.store = (SimulatedStream(self) for _ in range(3))

    def step(self):
        """Do one thing; False: there is nothing to be done, or nothing that can be."""
        ready = [stream for stream in (self.compute, self.load, self.store) if stream.can_go_on()]
        if not ready:
            return False
        self.done += 1
        ready[self._choose(len(ready))].queue.popleft()()
        return True

    def finish(self):
        """All of it."""
        while self.step():
            pass
        assert not any(stream.queue for stream in (self.compute, self.load, self.store)), "streams wait in a ring"


class Tampered:
    """A stream that does not do what it should. `trap`: so many submits go well, the next raises."""

    def __init__(self, stream, broken=()):
        self._stream, self._broken, self.trap = stream, broken, None

    def submit(self, work):
        if self.trap is not None:
            self.trap -= 1
            if self.trap < 0:
                self.trap = None
                raise OSError("injected")
        self._stream.submit(work)

    def record(self):
        event = self._stream.record()
        if "record" in self._broken:
            event = SimulatedEvent(None)
            event.over, event.at = True, 0
        return event

    def wait(self, event):
        if "wait" not in self._broken:
            self._stream.wait(event)

    def synchronize(self):
        if "synchronize" not in self._broken:
            self._stream.synchronize()


class TamperedStreams:
    """`broken`: by stream, what it leaves out."""

    def __init__(self, streams, broken):
        for name in ("compute", "load", "store"):
            setattr(self, name, Tampered(getattr(streams, name), broken.get(name, ())))
