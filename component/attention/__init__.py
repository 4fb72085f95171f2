"""Shift short attention: interface.py (transformers), shift_short.py (which tokens), segment.py, kernel.py (how)."""

from component.attention.interface import has_plain_attention, use_full_attention, use_shift_short_attention
from component.attention.shift_short import shift_short_attention

__all__ = ["has_plain_attention", "shift_short_attention", "use_full_attention", "use_shift_short_attention"]
