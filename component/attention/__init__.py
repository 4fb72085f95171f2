"""Shift short attention: shift_short.py (the method), segment.py and kernel.py (its computation), interface.py."""

from component.attention.interface import has_plain_attention, use_full_attention, use_shift_short_attention
from component.attention.shift_short import shift_short_attention

__all__ = ["has_plain_attention", "shift_short_attention", "use_full_attention", "use_shift_short_attention"]
