"""How are keys and values cached during generation, and how many bytes do they take?

`dynamic` stores them as computed, `offloaded` keeps all layers but one in CPU memory, and the others quantize them:
`fp8` to 8-bit floating point with one scale per layer, `int8`, `int4` and `int2` to integers with a scale and a zero
point per group of values (KIVI, arXiv 2402.02750, with groups within a token). All are transformers' own.
"""

import importlib.util
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, QuantizedCache, cache_utils

from component.error import UserError
from component.rope import rope_parameters

INTEGER_BITS = {"int8": 8, "int4": 4, "int2": 2}
HQQ = "hqq==0.2.8.post1"  # optimum-quanto would need two minutes of C++ compilation, and has no int8
RECENT_TOKENS = 128  # integer caches keep up to this many unquantized, and quantize them together


def check_cache(implementation: str) -> None:
    """Refuse, before any weight is loaded, a cache that is not available here."""
    if implementation == "offloaded" and not torch.cuda.is_available():
        raise UserError("--cache_implementation: offloaded saves GPU memory, but there is no GPU; use dynamic")
    if implementation == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        raise UserError(
            "--cache_implementation: the installed transformers has no fp8; install the version in requirements.txt, "
            "or use int8"
        )
    if implementation in INTEGER_BITS and importlib.util.find_spec("hqq") is None:
        raise UserError(
            f"--cache_implementation: {implementation} needs the package hqq; pip install {HQQ}, or use fp8"
        )


def new_cache(config: PretrainedConfig, implementation: str) -> Any:
    """An empty cache of one of `component.inference.flags.CACHES`.

    Raises:
        UserError: heads that cannot be divided into quantization groups.
    """
    if implementation in ("dynamic", "offloaded"):
        return DynamicCache(config=config, offloading=implementation == "offloaded")
    if implementation == "fp8":
        backend, options = "fp8", dict[str, int]()
    else:
        bits = INTEGER_BITS[implementation]
        backend, options = "hqq", {"nbits": bits, "axis_key": 1, "axis_value": 1, "residual_length": RECENT_TOKENS}
        options["q_group_size"] = group_values(config, bits)
    return QuantizedCache(backend, config, **options)


def group_values(config: PretrainedConfig, bits: int) -> int:
    """Quantization group size: neighboring values of a head that share a scale, at most 64.

    hqq packs values of 8 / bits groups into a byte, so the number of groups per token must be a multiple of that.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for values in (64, 32, 16, 8):
        if head % values == 0 and head * config.num_key_value_heads // values % (8 // bits) == 0:
            return values
    raise UserError(
        f"--cache_implementation: {config.num_key_value_heads} heads of {head} values cannot be quantized to {bits} "
        "bits in groups; use fp8 or dynamic"
    )


def has_fixed_frequencies(config: PretrainedConfig) -> bool:
    """Whether rotary frequencies do not depend on the current length."""
    return rope_parameters(config).get("rope_type", "default") not in ("dynamic", "longrope")


def tensor_bytes(cache: Any) -> int:
    """Bytes of all tensors in the layers of `cache`, at any depth; each tensor counts once."""
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sizes[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict | list | tuple):
            for inner in value.values() if isinstance(value, dict) else value:
                visit(inner)

    for layer in cache.layers:
        visit(vars(layer))
    return sum(sizes.values())


class PromptCache:
    """The KV cache of a conversation: the prefix shared with the previous prompt and answer is not recomputed.

    Only the dynamic cache can be cropped to that prefix. The others start empty for each prompt, and so does every
    cache if the rotary frequencies depend on the current length.
    """

    def __init__(self, config: PretrainedConfig, implementation: str = "dynamic") -> None:
        self.config, self.implementation = config, implementation
        self.is_reusable = implementation == "dynamic" and has_fixed_frequencies(config)
        self.forget()

    def forget(self) -> None:
        self._cache: Any = None
        self._ids: list[int] = []

    def start(self, prompt_ids: list[int]) -> Any:
        """The cache for generating from `prompt_ids`, filled with the prefix that was seen before."""
        shared = common_prefix(self._ids, prompt_ids[:-1])  # the last token must be computed: it predicts the next
        if self._cache is None or not self.is_reusable or shared == 0:
            self._cache = new_cache(self.config, self.implementation)
        elif len(self._ids) > shared:
            self._cache.crop(shared - len(self._ids))
        self._ids = []  # unknown until `finish`
        return self._cache

    def finish(self, ids: list[int]) -> None:
        """Record what the cache holds: `ids` (prompt and answer) without the last generated token."""
        self._ids = ids[: self._cache.get_seq_length()]

    @property
    def nbytes(self) -> int:
        return 0 if self._cache is None else tensor_bytes(self._cache)


def common_prefix(first: list[int], second: list[int]) -> int:
    """Length of the common prefix of two lists."""
    length = min(len(first), len(second))
    return next((at for at in range(length) if first[at] != second[at]), length)
