"""The activation offloader on a CPU: order, values, reused buffers. With CUDA: tests/end_to_end/test_memory_gpu.py."""

import copy
import gc
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode

from component.memory.offload import ActivationOffloader

ODD = [(3, 7), (1,), (5, 1, 13), (257, 64), (70_001,)]  # the last two beyond 256 blocks of alignment


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in shapes]


def assert_equal(found, expected):
    found = list(found)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("ahead", [True, False])
def test_last_in_first_out(ahead):
    offloader = ActivationOffloader(ahead)
    entries = [tensors(*ODD) for _ in range(5)]
    expected = copy.deepcopy(entries)
    fetches = [offloader.put(entry) for entry in entries]
    for entry in entries:
        for tensor in entry:
            tensor.zero_()  # the offloader has copies
    for fetch, wanted in zip(reversed(fetches), reversed(expected), strict=True):
        assert_equal(fetch(), wanted)
    assert offloader._entries == []


@pytest.mark.parametrize("ahead", [True, False])
def test_fetched_tensors_are_not_the_buffer(ahead):
    """The next forward pass overwrites the buffer while they may still be in use."""
    offloader = ActivationOffloader(ahead)
    entries = [tensors(*ODD) for _ in range(3)]
    fetches = [offloader.put(entry) for entry in entries]
    found = [list(fetch()) for fetch in reversed(fetches)]
    for _ in range(3):
        offloader.put(tensors(*ODD))
    for ours, wanted in zip(found, reversed(entries), strict=True):
        assert_equal(ours, wanted)


def test_fetching_out_of_order_is_rejected():
    offloader = ActivationOffloader()
    fetches = [offloader.put(tensors((4,))) for _ in range(3)]
    with pytest.raises(AssertionError, match="out of order"):
        fetches[0]()
    fetches[2]()
    with pytest.raises(AssertionError, match="out of order"):
        fetches[2]()
    with pytest.raises(AssertionError, match="out of order"):
        fetches[0]()
    fetches[1]()
    fetches[0]()
    with pytest.raises(AssertionError, match="out of order"):
        fetches[0]()


def test_overwritten_entries_cannot_be_fetched():
    """A later pass has overwritten the entry; the earlier pass would silently get wrong gradients."""
    offloader = ActivationOffloader()
    fetch = offloader.put(tensors((4,)))
    offloader.clear()
    later = offloader.put(tensors((4,)))
    with pytest.raises(AssertionError, match="another forward pass"):
        fetch()
    later()


@pytest.mark.parametrize("ahead", [True, False])
def test_buffers_are_reused(ahead):
    offloader = ActivationOffloader(ahead)
    identities = set()
    sizes = set()
    for step in range(50):
        fetches = [offloader.put(tensors((17, 5), (17, 3))) for _ in range(4)]
        if step % 10 == 7:
            offloader.clear()  # no backward pass
        else:
            for fetch in reversed(fetches):
                fetch()
        identities.add(tuple((id(buffer), buffer.data_ptr()) for buffer in offloader._buffers))
        sizes.add(offloader.nbytes)
    assert len(identities) == 1
    assert sizes == {4 * (512 + 256)}  # 340 and 204 bytes, in multiples of 256


def test_shapes_differ_between_steps():
    """Buffers grow to the largest row and stay allocated."""
    offloader = ActivationOffloader()
    sizes, pointers = [], []
    for tokens in (10, 100, 3, 77, 100, 1):
        entries = [tensors((tokens, 6), (2, tokens)) for _ in range(3)]
        fetches = [offloader.put(entry) for entry in entries]
        for fetch, wanted in zip(reversed(fetches), reversed(entries), strict=True):
            assert_equal(fetch(), wanted)
        sizes.append(offloader.nbytes)
        pointers.append([buffer.data_ptr() for buffer in offloader._buffers])
    assert sizes == [3 * (256 + 256)] + 5 * [3 * (2560 + 1024)]
    assert all(pointer == pointers[1] for pointer in pointers[1:])


def test_only_a_buffer_that_is_replaced_is_unpinned(monkeypatch):
    unpinned = []
    monkeypatch.setattr(
        "component.memory.offload._unpin", lambda buffers: unpinned.extend(len(buffer) for buffer in buffers)
    )
    offloader = ActivationOffloader()
    for first in (16, 400):  # 256 bytes, then 1792; the two others stay 512
        for size in (first, 100, 100):
            offloader.put(tensors((size,)))
        offloader.clear()
    assert [len(buffer) for buffer in offloader._buffers] == [1792, 512, 512]
    assert unpinned == [0, 0, 0, 256]  # empty ones, then the one that grew


def test_depth_differs_between_steps():
    offloader = ActivationOffloader()
    for depth in (2, 5, 1, 5):
        entries = [tensors((depth, 9)) for _ in range(depth)]
        fetches = [offloader.put(entry) for entry in entries]
        for fetch, wanted in zip(reversed(fetches), reversed(entries), strict=True):
            assert_equal(fetch(), wanted)
    assert len(offloader._buffers) == 5


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bool, torch.int64)], ids=str
)
def test_types_and_odd_sizes(dtypes):
    """Each part is aligned for its dtype."""
    offloader = ActivationOffloader()
    entry = [*tensors((3, 7), dtype=dtypes[0]), *tensors((1, 11), dtype=dtypes[1]), *tensors((0, 4), (1,))]
    assert_equal(offloader.put(entry)(), entry)


def test_strided_tensors():
    offloader = ActivationOffloader()
    entry = [torch.randn(6, 5, 4).transpose(0, 2), torch.randn(3, 1).expand(3, 8), torch.randn(10)[::3]]
    assert_equal(offloader.put(entry)(), entry)


def test_clearing_keeps_the_buffers():
    offloader = ActivationOffloader()
    for _ in range(3):
        offloader.put(tensors((8, 8)))
    before = offloader.nbytes
    offloader.clear()
    assert offloader._entries == []
    assert offloader.nbytes == before == 3 * 256
    entry = tensors((8, 8))
    assert_equal(offloader.put(entry)(), entry)


def test_an_offloader_can_be_freed():
    offloader = ActivationOffloader()
    offloader.put(tensors((8, 8)))
    buffers = offloader._buffers
    del offloader
    gc.collect()
    assert len(buffers) == 1


def test_a_copy_is_another_offloader():
    offloader = ActivationOffloader(fetches_ahead=False)
    offloader.put(tensors((8, 8)))
    other, same = copy.deepcopy([offloader, offloader])
    assert other is same
    assert other is not offloader
    assert (other.fetches_ahead, other.nbytes, other._entries) == (False, 0, [])


# ---- streams, recorded on a CPU


class OnGpu(torch.Tensor):
    """A CPU tensor that says that it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


class FakeStreams(TorchFunctionMode):
    """Logs what each CUDA stream waits for, and on which stream copies run."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.log: list[str] = []
        self.current, self.events = "compute", 0
        compute, side = FakeStream(self, "compute"), FakeStream(self, "side")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: compute)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: side)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr("component.memory.offload._pin", lambda buffer, is_needed: buffer)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty_like:
            return torch.empty(args[0].shape, dtype=args[0].dtype)
        if function is torch.Tensor.copy_:
            self.log.append(f"copy on {self.current}")
        return function(*args, **kwargs)


class FakeStream:
    def __init__(self, streams: FakeStreams, name: str):
        self.streams, self.name = streams, name

    def wait_stream(self, other: "FakeStream") -> None:
        self.streams.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: int) -> None:
        self.streams.log.append(f"{self.name} waits for event {event}")

    def synchronize(self) -> None:
        self.streams.log.append(f"wait until {self.name} is done")

    def record_event(self) -> int:
        self.streams.events += 1
        self.streams.log.append(f"event {self.streams.events} on {self.name}")
        return self.streams.events

    def __enter__(self) -> None:
        self.streams.current = self.name

    def __exit__(self, *_) -> None:
        self.streams.current = "compute"


def copied(event: int) -> list[str]:
    """A copy on the side stream, of what the compute stream has produced or freed by now."""
    return ["side waits for compute", "copy on side", f"event {event} on side"]


def test_copies_wait_for_their_tensors_and_are_waited_for(monkeypatch):
    with FakeStreams(monkeypatch) as streams:
        offloader = ActivationOffloader()
        first, second = (torch.randn(4).as_subclass(OnGpu) for _ in range(2))
        fetches = [offloader.put([first]), offloader.put([second])]
        # the first tensor may be reused, and the second's buffer replaced by a larger one, only after the first copy
        assert streams.log == [*copied(1), "compute waits for event 1", "wait until side is done", *copied(2)]
        streams.log.clear()
        found = next(fetches[1]())
        assert streams.log == ["compute waits for event 2", *copied(3), *copied(4), "compute waits for event 3"]
        assert torch.equal(found, second.as_subclass(torch.Tensor))
        streams.log.clear()
        assert torch.equal(next(fetches[0]()), first.as_subclass(torch.Tensor))
        assert streams.log == ["compute waits for event 4"]


def test_the_rest_of_a_layer_is_fetched_when_asked_for(monkeypatch):
    """Its first tensor ahead; and each is waited for when it is taken."""
    with FakeStreams(monkeypatch) as streams:
        offloader = ActivationOffloader()
        layers = [[torch.randn(size).as_subclass(OnGpu) for size in (4, 3, 2)] for _ in range(2)]
        below, above = (offloader.put(layer) for layer in layers)
        streams.log.clear()
        arriving = above()
        three = ["side waits for compute", *(3 * ["copy on side", "event"])]
        ahead = ["side waits for compute", "copy on side", "event"]
        assert streams.log[0] == "compute waits for event 2"
        assert [line if "event" not in line else "event" for line in streams.log[1:]] == [*three, *ahead]
        streams.log.clear()
        assert torch.equal(next(arriving), layers[1][0].as_subclass(torch.Tensor))
        assert streams.log == ["compute waits for event 3"]
        offloader.fetch_rest()
        assert streams.log[1:] == [*copied(7), *copied(8)[1:]]  # the copy of the first one, event 6, is under way
        offloader.fetch_rest()
        streams.log.clear()
        for wanted in layers[1][1:]:
            assert torch.equal(next(arriving), wanted.as_subclass(torch.Tensor))
        assert streams.log == ["compute waits for event 4", "compute waits for event 5"]
        streams.log.clear()
        assert_equal(below(), [tensor.as_subclass(torch.Tensor) for tensor in layers[0]])
        assert streams.log == [f"compute waits for event {event}" for event in (6, 7, 8)]
        offloader.fetch_rest()  # nothing is left


def test_nothing_is_fetched_ahead_unless_asked_for():
    offloader = ActivationOffloader(fetches_ahead=False)
    entries = [tensors((4,), (3,)) for _ in range(2)]
    fetches = [offloader.put(entry) for entry in entries]
    fetches[1]()
    offloader.fetch_rest()
    assert offloader._entries[0].fetched == []
    assert_equal(fetches[0](), entries[0])


def test_a_fetched_tensor_is_not_held():
    """It may be freed as soon as its user frees it, while others are still to be taken."""
    offloader = ActivationOffloader()
    arriving = offloader.put(tensors((4,), (3,)))()
    first = weakref.ref(next(arriving))
    assert first() is None
    second = weakref.ref(next(arriving))
    assert second() is None


def test_k11_clearing_waits_for_copies_under_way(monkeypatch):
    """The second entry's copy to CPU memory, or the first's prefetch from there and what is untaken of the second."""
    with FakeStreams(monkeypatch) as streams:
        for is_fetched in (False, True):
            offloader, base = ActivationOffloader(), streams.events
            fetches = [offloader.put([torch.randn(4).as_subclass(OnGpu)]) for _ in range(2)]
            if is_fetched:
                fetches[1]()
            streams.log.clear()
            offloader.clear()
            waited = (4, 3) if is_fetched else (2,)
            assert streams.log == [f"compute waits for event {base + event}" for event in waited]
            assert offloader._entries == []
            streams.log.clear()
            offloader.clear()
            assert streams.log == []


def test_forgetting_waits_for_nothing(monkeypatch):
    """Of a CUDA graph whose recording failed: its events never happened, and to wait for one is an error."""
    with FakeStreams(monkeypatch) as streams:
        offloader = ActivationOffloader()
        for _ in range(2):
            offloader.put([torch.randn(4).as_subclass(OnGpu)])
        streams.log.clear()
        offloader.forget()
        offloader.clear()
        assert streams.log == []
