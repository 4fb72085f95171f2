"""How are keys and values cached during generation, how many bytes do they take, and what of them is used again?

`dynamic` stores them as computed, `offloaded` keeps all layers but one in CPU memory; both are transformers' own.
`int8`, `fp8`, `int4` and `int2` store blocks of them with fewer bits, see component/inference/quantized_layer.py.
"""

from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from component.error import UserError
from component.inference.block_attention import NAME
from component.inference.quantized_layer import BLOCK, FORMATS, BlockQuantizedLayer, BlockStore
from component.rope import rope_parameters

CHUNK = 4096  # tokens per forward pass while a prompt is read, a multiple of BLOCK; the memory of longer ones grows


def check_cache(implementation: str) -> None:
    """Refuse, before any weight is loaded, a cache that is not available here."""
    if implementation == "offloaded" and not torch.cuda.is_available():
        raise UserError("--cache_implementation: offloaded saves GPU memory, but there is no GPU; use dynamic")


def new_cache(config: PretrainedConfig, implementation: str) -> Cache:
    """An empty cache of one of `component.inference.flags.CACHES`, but auto.

    Raises:
        UserError: quantization of a model whose layers do not all attend to every token.
    """
    if implementation == "offloaded":
        return OffloadedCache(config=config, offloading=True)
    if implementation == "dynamic":
        return DynamicCache(config=config)
    assert implementation in FORMATS, implementation
    check_quantizable(config, implementation)
    keeps_blocks = config._attn_implementation == NAME
    return Cache(layers=[BlockQuantizedLayer(implementation, keeps_blocks) for _ in range(config.num_hidden_layers)])


class OffloadedCache(DynamicCache):
    """transformers' own, whose copies from CPU memory wait for those to it.

    They run on a stream of their own. In version 5.17 they wait for nothing, so a layer reads what its copy to CPU
    memory has not written yet: answers are wrong wherever Python is ahead of the GPU. Version 5.23 waits itself.
    """

    def prefetch(self, *args: Any, **kwargs: Any) -> None:
        self.prefetch_stream.wait_stream(torch.cuda.current_stream())
        super().prefetch(*args, **kwargs)


def is_quantizable(config: PretrainedConfig) -> bool:
    """Whether every layer attends to all tokens; those with a sliding window forget some."""
    return {type(layer) for layer in DynamicCache(config=config).layers} == {DynamicLayer}


def check_quantizable(config: PretrainedConfig, implementation: str) -> None:
    if implementation in FORMATS and not is_quantizable(config):
        raise UserError(
            f"--cache_implementation: {implementation} is for models with full attention in every layer, and "
            f"{config.model_type!r} has sliding windows; use dynamic or offloaded"
        )


def has_fixed_frequencies(config: PretrainedConfig) -> bool:
    """Whether rotary frequencies do not depend on the current length."""
    return rope_parameters(config).get("rope_type", "default") not in ("dynamic", "longrope")


def tensor_bytes(cache: Any) -> int:
    """Bytes of all tensors in the layers of `cache`, at any depth; memory that several share counts once."""
    sizes: dict[int, int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            memory = value.untyped_storage()
            sizes[memory.data_ptr()] = memory.nbytes()
        elif isinstance(value, dict | list | tuple):
            for inner in value.values() if isinstance(value, dict) else value:
                visit(inner)
        elif isinstance(value, BlockStore):
            visit(value.segments)

    for layer in cache.layers:
        visit(vars(layer))
    return sum(sizes.values())


class PromptCache:
    """The KV cache of a conversation: the prefix shared with the previous prompt and answer is not recomputed.

    Quantized keys and values depend on which tokens were computed in one forward pass: these attend to each other as
    computed. So that answers are those of a cache that starts empty, only whole forward passes of a prompt are kept;
    the tokens after them, fewer than `chunk` and the answer's, are computed again. If the rotary frequencies depend on
    the current length, nothing is kept, and a prompt is read in one forward pass. Of a sliding window that has moved
    on, everything is kept or nothing.
    """

    def __init__(self, config: PretrainedConfig, implementation: str = "dynamic", chunk: int = CHUNK) -> None:
        assert chunk % BLOCK == 0, chunk
        self.config, self.implementation = config, implementation
        self.is_reusable = has_fixed_frequencies(config)
        self.chunk = chunk if self.is_reusable else 2**40
        self.forget()

    def forget(self) -> None:
        self._cache: Any = None
        self._ids: list[int] = []
        self._prompt_tokens = 0
        self.used_tokens = 0  # of the last prompt and its answer

    def start(self, prompt_ids: list[int]) -> Any:
        """The cache for generating from `prompt_ids`, filled with the prefix that was seen before."""
        shared = common_prefix(self._ids, prompt_ids[:-1])  # the last token must be computed: it predicts the next
        if self.implementation in FORMATS:
            shared = min(shared, self._prompt_tokens) // self.chunk * self.chunk
        is_cropped = len(self._ids) > shared
        if self._cache is None or not self.is_reusable or shared == 0 or (is_cropped and has_forgotten(self._cache)):
            self._cache = None  # its memory is free before that of the new one is needed
            self._cache = new_cache(self.config, self.implementation)
        elif is_cropped:
            self._cache.crop(shared - len(self._ids))
        self._ids, self._prompt_tokens = [], len(prompt_ids)  # ids are unknown until `finish`
        return self._cache

    def finish(self, ids: list[int]) -> None:
        """Record what the cache holds: `ids` (prompt and answer) without the last generated token."""
        self.used_tokens = len(ids)
        self._ids = ids[: self._cache.get_seq_length()]

    @property
    def nbytes(self) -> int:
        return 0 if self._cache is None else tensor_bytes(self._cache)


def has_forgotten(cache: Cache) -> bool:
    """Whether a sliding window has left tokens behind: without its last tokens, it would lack those before it."""
    sliding = [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]
    return any(layer.get_seq_length() >= layer.sliding_window for layer in sliding)


def common_prefix(first: list[int], second: list[int]) -> int:
    """Length of the common prefix of two lists."""
    length = min(len(first), len(second))
    return next((at for at in range(length) if first[at] != second[at]), length)
