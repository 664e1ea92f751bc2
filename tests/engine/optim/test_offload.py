"""Host tensors on three streams: whatever order the streams run in, each piece is changed once and nothing overtakes."""

import random
from contextlib import contextmanager

import pytest
import torch
from torch.overrides import TorchFunctionMode

import engine.optim.offload
from engine.optim.offload import on_device, pieces_of


class Device:
    """Streams that run later, one operation at a time, in an order that only their events restrict."""

    def __init__(self):
        self.streams = []
        self.current = self.stream()

    def stream(self, device=None):
        made = Stream(self)
        self.streams.append(made)
        return made

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def run(self, order):
        while waiting := [stream for stream in self.streams if stream.queue]:
            ready = [stream for stream in waiting if stream.queue[0][0]()]
            assert ready, "the streams wait for one another"
            order.choice(ready).queue.pop(0)[1]()


class Stream:
    def __init__(self, device):
        self.device, self.queue = device, []

    def enqueue(self, action, ready=lambda: True):
        self.queue.append((ready, action))

    def record_event(self):
        passed = []
        self.enqueue(lambda: passed.append(True))
        return passed

    def wait_event(self, passed):
        self.enqueue(lambda: None, lambda: bool(passed))

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Deferred(TorchFunctionMode):
    """Copies run when their stream does."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            assert kwargs == {"non_blocking": True}
            self.device.current.enqueue(lambda: args[0].detach().copy_(args[1]))
            return args[0]
        return function(*args, **(kwargs or {}))


def faked(monkeypatch):
    device = Device()
    for name, fake in (("Stream", device.stream), ("stream", device.on), ("current_stream", lambda _: device.current)):
        monkeypatch.setattr(torch.cuda, name, fake)
    return device


@pytest.mark.parametrize("count", [1, 2, 7])
def test_streams_may_run_in_any_order(count, monkeypatch):
    for seed in range(40):
        device = faked(monkeypatch)
        hosts = [[torch.full((4,), 10.0 * number + place) for place in range(2)] for number in range(count)]
        hosts[-1] = [tensor[:3] for tensor in hosts[-1]]
        expected = [[2 * tensor + number for tensor in piece] for number, piece in enumerate(hosts)]
        with Deferred(device):
            found = engine.optim.offload._streamed(hosts, torch.device("cpu"))
            for number, piece in enumerate(found):
                for tensor in piece:
                    device.current.enqueue(lambda tensor=tensor, number=number: tensor.mul_(2).add_(number))
        done = []
        device.current.enqueue(lambda done=done, hosts=hosts: done.append([[t.clone() for t in piece] for piece in hosts]))
        device.run(random.Random(seed))
        # The current stream has waited for everything that came before.
        torch.testing.assert_close(done[0], expected, rtol=0, atol=0)


def test_a_piece_comes_in_while_another_goes_out(monkeypatch):
    """The third piece takes the first one's slot, whatever the second waits for."""
    device = faked(monkeypatch)
    hosts = [[torch.full((2,), float(number))] for number in range(3)]
    seen, opened = [], []
    with Deferred(device):
        for number, (tensor,) in enumerate(engine.optim.offload._streamed(hosts, torch.device("cpu"))):
            device.current.enqueue(
                lambda tensor=tensor: seen.append(float(tensor[0])), lambda number=number: number != 1 or bool(opened)
            )
    _, incoming, _ = device.streams
    while ready := [stream for stream in device.streams if stream.queue and stream.queue[0][0]()]:
        ready[0].queue.pop(0)[1]()
    # The second piece's computation is stuck; all three have come in.
    assert seen == [0.0]
    assert not incoming.queue
    opened.append(True)
    device.run(random.Random(0))
    assert seen == [0.0, 1.0, 2.0]


def test_pieces_cover_a_tensor_once_and_start_at_whole_groups_of_random_words(monkeypatch):
    monkeypatch.setattr(engine.optim.offload, "PIECE", 8)
    assert pieces_of(20) == [slice(0, 8), slice(8, 16), slice(16, 20)]
    assert pieces_of(8) == [slice(0, 8)]
    assert pieces_of(0) == []
    monkeypatch.undo()
    assert engine.optim.offload.PIECE % 4 == 0


def test_on_the_host_the_pieces_are_changed_where_they_are():
    hosts = [[torch.zeros(2)], [torch.ones(3)]]
    for (tensor,) in on_device(hosts, torch.device("cpu")):
        tensor.add_(1)
    assert [tensor.tolist() for (tensor,) in hosts] == [[1, 1], [2, 2, 2]]
    assert list(on_device([], torch.device("cuda"))) == []
