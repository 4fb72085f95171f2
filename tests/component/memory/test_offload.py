"""The host's stack on a CPU: order, values, and buffers used again. With CUDA: tests/end_to_end/test_memory_gpu.py."""

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
    stack = ActivationOffloader(ahead)
    entries = [tensors(*ODD) for _ in range(5)]
    expected = copy.deepcopy(entries)
    takes = [stack.put(entry) for entry in entries]
    for entry in entries:
        for tensor in entry:
            tensor.zero_()  # the stack has copies
    for take, wanted in zip(reversed(takes), reversed(expected), strict=True):
        assert_equal(take(), wanted)
    assert stack._entries == []


@pytest.mark.parametrize("ahead", [True, False])
def test_what_comes_back_is_not_the_buffer(ahead):
    """The next step's forward pass writes there while this one's gradients may still be needed."""
    stack = ActivationOffloader(ahead)
    entries = [tensors(*ODD) for _ in range(3)]
    takes = [stack.put(entry) for entry in entries]
    found = [take() for take in reversed(takes)]
    for _ in range(3):
        stack.put(tensors(*ODD))
    for ours, wanted in zip(found, reversed(entries), strict=True):
        assert_equal(ours, wanted)


def test_any_other_order_is_refused():
    stack = ActivationOffloader()
    takes = [stack.put(tensors((4,))) for _ in range(3)]
    with pytest.raises(AssertionError, match="another order"):
        takes[0]()
    takes[2]()
    with pytest.raises(AssertionError, match="another order"):
        takes[2]()
    with pytest.raises(AssertionError, match="another order"):
        takes[0]()
    takes[1]()
    takes[0]()
    with pytest.raises(AssertionError, match="another order"):
        takes[0]()


def test_what_another_forward_pass_has_overwritten_is_not_handed_out():
    """As deep as before, but with the values of the later pass: gradients of the earlier would be silently wrong."""
    stack = ActivationOffloader()
    take = stack.put(tensors((4,)))
    stack.clear()
    later = stack.put(tensors((4,)))
    with pytest.raises(AssertionError, match="another forward pass"):
        take()
    later()


@pytest.mark.parametrize("ahead", [True, False])
def test_buffers_are_used_again(ahead):
    stack = ActivationOffloader(ahead)
    identities = set()
    sizes = set()
    for step in range(50):
        takes = [stack.put(tensors((17, 5), (17, 3))) for _ in range(4)]
        if step % 10 == 7:
            stack.clear()  # no backward pass
        else:
            for take in reversed(takes):
                take()
        identities.add(tuple((id(buffer), buffer.data_ptr()) for buffer in stack._buffers))
        sizes.add(stack.nbytes)
    assert len(identities) == 1
    assert sizes == {4 * (512 + 256)}  # 340 and 204 bytes, in multiples of 256


def test_shapes_differ_between_steps():
    """Buffers grow to the largest and stay: a shorter row leaves them, the next long one finds them."""
    stack = ActivationOffloader()
    sizes, pointers = [], []
    for tokens in (10, 100, 3, 77, 100, 1):
        entries = [tensors((tokens, 6), (2, tokens)) for _ in range(3)]
        takes = [stack.put(entry) for entry in entries]
        for take, wanted in zip(reversed(takes), reversed(entries), strict=True):
            assert_equal(take(), wanted)
        sizes.append(stack.nbytes)
        pointers.append([buffer.data_ptr() for buffer in stack._buffers])
    assert sizes == [3 * (256 + 256)] + 5 * [3 * (2560 + 1024)]
    assert all(pointer == pointers[1] for pointer in pointers[1:])


def test_depth_differs_between_steps():
    stack = ActivationOffloader()
    for depth in (2, 5, 1, 5):
        entries = [tensors((depth, 9)) for _ in range(depth)]
        takes = [stack.put(entry) for entry in entries]
        for take, wanted in zip(reversed(takes), reversed(entries), strict=True):
            assert_equal(take(), wanted)
    assert len(stack._buffers) == 5


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32), (torch.bool, torch.int64)], ids=str
)
def test_types_and_odd_sizes(dtypes):
    """Each part starts where its type may, however odd the size of the one before."""
    stack = ActivationOffloader()
    entry = [*tensors((3, 7), dtype=dtypes[0]), *tensors((1, 11), dtype=dtypes[1]), *tensors((0, 4), (1,))]
    assert_equal(stack.put(entry)(), entry)


def test_strided_tensors():
    stack = ActivationOffloader()
    entry = [torch.randn(6, 5, 4).transpose(0, 2), torch.randn(3, 1).expand(3, 8), torch.randn(10)[::3]]
    assert_equal(stack.put(entry)(), entry)


def test_clearing_keeps_the_buffers():
    stack = ActivationOffloader()
    for _ in range(3):
        stack.put(tensors((8, 8)))
    before = stack.nbytes
    stack.clear()
    assert stack._entries == []
    assert stack.nbytes == before == 3 * 256
    entry = tensors((8, 8))
    assert_equal(stack.put(entry)(), entry)


def test_a_stack_is_freed():
    stack = ActivationOffloader()
    stack.put(tensors((8, 8)))
    buffers = stack._buffers
    del stack
    gc.collect()
    assert len(buffers) == 1


def test_a_copy_is_another_stack():
    stack = ActivationOffloader(fetches_ahead=False)
    stack.put(tensors((8, 8)))
    other, same = copy.deepcopy([stack, stack])
    assert other is same
    assert other is not stack
    assert (other.fetches_ahead, other.nbytes, other._entries) == (False, 0, [])
