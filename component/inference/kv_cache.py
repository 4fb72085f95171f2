"""How are keys and values kept while text is generated, and how many bytes do they take?

`dynamic` keeps them as they are computed, `offloaded` keeps those of all layers but one in host memory, and the others
round them: `fp8` to 8-bit floating point with one scale per layer, `int8`, `int4` and `int2` to integers with a scale
and a zero point per group of values (KIVI, arXiv 2402.02750, with groups inside a token). All are transformers' own.
"""

import importlib.util
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, QuantizedCache, cache_utils

from component.error import UserError
from component.rope import rope_parameters

INTEGER_BITS = {"int8": 8, "int4": 4, "int2": 2}
CACHES = ("dynamic", "offloaded", "fp8", *INTEGER_BITS)
HQQ = "hqq==0.2.8.post1"  # optimum-quanto rounds as well, but compiles C++ for two minutes first, and has no int8
RECENT_TOKENS = 128  # of the integer caches, in full precision: they are rounded together, not one by one


def check_cache(implementation: str) -> None:
    """Refuse, before any weight is loaded, a cache that cannot work here."""
    if implementation == "offloaded" and not torch.cuda.is_available():
        raise UserError(
            "--cache_implementation: offloaded keeps a GPU's memory free, but there is no GPU; use dynamic"
        )
    if implementation == "fp8" and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        raise UserError(
            "--cache_implementation: this transformers knows no fp8; install the one in requirements.txt, or use int8"
        )
    if implementation in INTEGER_BITS and importlib.util.find_spec("hqq") is None:
        raise UserError(
            f"--cache_implementation: {implementation} needs the package hqq; pip install {HQQ}, or use fp8"
        )


def new_cache(config: PretrainedConfig, implementation: str) -> Any:
    """An empty cache of one of `CACHES`.

    Raises:
        UserError: heads too narrow to be rounded in groups.
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
    """Neighbouring values of a token's head that share a scale, at most 64.

    hqq puts values of different groups into one byte, so a token's groups must come out even: 8 / bits of them or a
    multiple.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for values in (64, 32, 16, 8):
        if head % values == 0 and head * config.num_key_value_heads // values % (8 // bits) == 0:
            return values
    raise UserError(
        f"--cache_implementation: {config.num_key_value_heads} heads of {head} values cannot be rounded to {bits} "
        "bits in groups; use fp8 or dynamic"
    )


def tensor_bytes(holder: Any) -> int:
    """Bytes of all tensors in `holder`, however deep in lists, dictionaries and layers; a tensor counts once."""
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sizes[id(value)] = value.numel() * value.element_size()
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(inner)

    for layer in holder.layers:
        visit(vars(layer))
    return sum(sizes.values())


class PromptCache:
    """The cache of one conversation: what a prompt shares with the last one and its answer is not computed again.

    Only the dynamic cache can be cut back to the shared beginning; the others begin anew with each prompt, and so does
    every cache where the frequencies of positions depend on the length at hand.
    """

    def __init__(self, config: PretrainedConfig, implementation: str = "dynamic") -> None:
        self.config, self.implementation = config, implementation
        is_steady = rope_parameters(config).get("rope_type", "default") not in ("dynamic", "longrope")
        self.is_reusable = implementation == "dynamic" and is_steady
        self.forget()

    def forget(self) -> None:
        self._cache: Any = None
        self._ids: list[int] = []

    def start(self, prompt_ids: list[int]) -> Any:
        """The cache to continue `prompt_ids` with; it holds their beginning already if that has been seen."""
        shared = common_prefix(self._ids, prompt_ids[:-1])  # the last token is computed: it says what comes next
        if self._cache is None or not self.is_reusable or shared == 0:
            self._cache = new_cache(self.config, self.implementation)
        elif len(self._ids) > shared:
            self._cache.crop(shared - len(self._ids))
        self._ids = []  # until `finish`, nobody knows what it holds
        return self._cache

    def finish(self, ids: list[int]) -> None:
        """Note what the cache holds now: `ids`, prompt and answer, but for the token that came last."""
        self._ids = ids[: self._cache.get_seq_length()]

    @property
    def bytes_held(self) -> int:
        return 0 if self._cache is None else tensor_bytes(self._cache)


def common_prefix(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    length = min(len(first), len(second))
    return next((at for at in range(length) if first[at] != second[at]), length)
