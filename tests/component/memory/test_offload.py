"""The activation offloader on a CPU: order, values, reused buffers. With CUDA: tests/end_to_end/test_memory_gpu.py."""

import copy
import gc

import pytest
import torch

from component.memory.offload import ActivationOffloader

ODD = [(3, 7), (1,), (5, 1, 13)]


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in shapes]


def assert_equal(found, expected):
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
    found = [fetch() for fetch in reversed(fetches)]
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
