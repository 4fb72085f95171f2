"""How are several prompts answered at once? Left-padded; each answer is the one that its prompt gets alone.

Whatever would make an answer depend on its neighbors is kept apart by row: random numbers, the repetition penalty, the
room left in the context, the end.
"""

import argparse

import torch
from torch.nn.functional import pad
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from component.error import UserError
from component.inference.context import free_context
from component.inference.generate import answer_text, cache_from_flags, check_prompt, generation_config, prefill
from component.inference.kv_cache import has_fixed_frequencies, is_quantizable, new_cache
from component.inference.stop import has_stop


def check_batch(config: PretrainedConfig, flags: argparse.Namespace) -> None:
    """Refuse a batch in which answers would depend on their neighbors, once `fit_cache` has chosen the cache.

    Raises:
        UserError: quantized keys and values share scales, or rotary frequencies follow the longest row.
    """
    if flags.batch_size == 1:
        return
    if flags.cache_implementation not in ("dynamic", "offloaded"):
        reason = f"--cache_implementation {flags.cache_implementation} quantizes rows"
    elif not has_fixed_frequencies(config):
        reason = "the model's rotary frequencies depend on the length of rows"
    else:
        return
    raise UserError(f"--batch_size: {flags.batch_size}, but {reason} together; use --batch_size 1")


def check_rows(config: PretrainedConfig) -> None:
    """Refuse several rows for a model whose rotary frequencies follow the longest one."""
    if not has_fixed_frequencies(config):
        raise UserError("--batch_size: the model's rotary frequencies depend on the length of rows; set it to 1")


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    seeds: list[int],
    flags: argparse.Namespace,
) -> list[str]:
    """The text of the answer to each prompt, as `batch_ids` generates it."""
    found = batch_ids(model, tokenizer, prompts, seeds, flags)
    return [answer_text(tokenizer, ids, flags.stop or ()) for ids in found]


def batch_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    seeds: list[int],
    flags: argparse.Namespace,
) -> list[list[int]]:
    """The tokens of the answer to each prompt, with the one that ended it.

    Args:
        prompts: token ids; none fills the context.
        seeds: of each answer, if it is sampled.
    """
    input_ids, mask, pads = _left_padded(model, tokenizer, prompts)
    longest = input_ids.shape[1]
    room = [min(flags.max_new_tokens, free_context(model, prompt)) for prompt in prompts]
    stops = flags.stop or ()
    ends = _Ends(tokenizer, longest, room, stops)
    config = generation_config(model, tokenizer, max(room), stops, do_sample=False)  # _Rows samples
    past = _read_each(model, prompts, flags.cache_implementation)
    if len(prompts) == 1:  # as `generate` reads it: memory was estimated, and quantized answers differ otherwise
        prefill(model, input_ids, past, cache_from_flags(model, flags).chunk)
    output = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        generation_config=config,
        past_key_values=past,
        logits_processor=LogitsProcessorList([_Rows(pads, seeds, flags)]),
        stopping_criteria=StoppingCriteriaList([ends]),
    )
    end_ids = torch.tensor(config.eos_token_id)
    return [_until_end(row[longest : longest + most].cpu(), end_ids) for row, most in zip(output, room, strict=True)]


def greedy_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """The greedy continuation of each prompt, as generate_greedy's; may exceed the model's context.

    Raises:
        UserError: a model whose rotary frequencies follow the longest row, and several prompts.
    """
    if len(prompts) > 1:
        check_rows(model.config)
    input_ids, mask, _ = _left_padded(model, tokenizer, prompts)
    config = generation_config(model, tokenizer, max_new_tokens, do_sample=False)
    past = _read_each(model, prompts, "dynamic")
    output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, past_key_values=past)
    end_ids = torch.tensor(config.eos_token_id)
    return [_until_end(row.cpu(), end_ids) for row in output[:, input_ids.shape[1] :]]


@torch.no_grad()
def _read_each(model: PreTrainedModel, prompts: list[list[int]], implementation: str) -> Cache:
    """A cache for generating from left-padded prompts, with all tokens of each but its last.

    Each prompt is read alone, without a mask: SDPA's fast kernels take none, and a mask of B x T x T booleans needs
    27 GB at 25 prompts of 32768 tokens. Empty for a single prompt, which needs no mask, and for caches and layers
    whose keys and values can't be padded.
    """
    together = new_cache(model.config, implementation)
    is_padded = implementation == "dynamic" and is_quantizable(model.config) and min(map(len, prompts)) > 1
    if len(prompts) == 1 or not is_padded:
        return together
    device, longest = model.get_input_embeddings().weight.device, max(map(len, prompts)) - 1
    found: dict[tuple[int, ...], Cache] = {}
    for prompt in map(tuple, prompts):
        if prompt not in found:
            found[prompt] = new_cache(model.config, implementation)
            ids = torch.tensor([prompt[:-1]], device=device)
            model.get_decoder()(input_ids=ids, past_key_values=found[prompt], use_cache=True)
    for index in range(len(together.layers)):
        layers = [found[tuple(prompt)].layers[index] for prompt in prompts]
        keys, values = (
            torch.cat([pad(part, (0, 0, longest - part.shape[2], 0)) for part in parts])
            for parts in zip(*((layer.keys, layer.values) for layer in layers), strict=True)
        )
        together.update(keys, values, index)
        for layer in layers:
            layer.keys = layer.values = None  # frees memory before the next layer needs it
    return together


def _left_padded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Ids and attention mask, (B, T) each, on the model's device, and the padding of each row."""
    for prompt in prompts:
        check_prompt(model, tokenizer, prompt)
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    device = model.get_input_embeddings().weight.device
    filler = tokenizer.eos_token_id  # any id: padding is masked
    input_ids = torch.tensor([[filler] * n + ids for n, ids in zip(pads, prompts, strict=True)], device=device)
    mask = torch.tensor([[0] * n + [1] * len(ids) for n, ids in zip(pads, prompts, strict=True)], device=device)
    return input_ids, mask, pads


def _until_end(ids: torch.Tensor, end_ids: torch.Tensor) -> list[int]:
    """The generated ids up to the first that ends a text, without the padding after it."""
    found = torch.isin(ids, end_ids).nonzero()
    return ids[: int(found[0]) + 1].tolist() if len(found) else ids.tolist()


class _Rows(LogitsProcessor):
    """Processes the logits (B, V) of each row as if it were alone, and draws by the Gumbel-max trick.

    The largest of logits plus Gumbel noise is a sample from their softmax (Maddison et al., arXiv 1411.0030), so that
    each row has random numbers of its own.
    """

    def __init__(self, pads: list[int], seeds: list[int], flags: argparse.Namespace) -> None:
        self.pads = pads
        self.steps: list[LogitsProcessor] = []
        if flags.repetition_penalty != 1:
            self.steps.append(RepetitionPenaltyLogitsProcessor(flags.repetition_penalty))
        self.random = [torch.Generator().manual_seed(seed) for seed in seeds] if flags.do_sample else []
        if flags.do_sample:
            self.steps.append(TemperatureLogitsWarper(flags.temperature))
            self.steps += [TopKLogitsWarper(flags.top_k)] if flags.top_k else []
            self.steps += [TopPLogitsWarper(flags.top_p)] if flags.top_p < 1 else []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        rows = []
        for row, padding in enumerate(self.pads):
            ids, logits = input_ids[row : row + 1, padding:], scores[row : row + 1]
            for step in self.steps:
                logits = step(ids, logits)  # type: ignore[arg-type]
            if self.random:
                uniform = torch.rand(logits.shape, generator=self.random[row], dtype=torch.float64)
                logits = logits + (-torch.log(-torch.log(uniform))).to(logits)
            rows.append(logits)
        return torch.cat(rows)  # type: ignore[return-value]


class _Ends(StoppingCriteria):
    """Ends a row at its stop string, or at the end of its room; generate() itself at an end-of-sequence token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: int, room: list[int], stops: tuple | list) -> None:
        self.tokenizer, self.prompt, self.room, self.stops = tokenizer, prompt, room, stops

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: object) -> torch.BoolTensor:
        answers = input_ids[:, self.prompt :]
        ended = [
            answers.shape[1] >= room or has_stop(self.tokenizer, answer, self.stops)
            for answer, room in zip(answers.tolist(), self.room, strict=True)
        ]
        return torch.tensor(ended, device=input_ids.device)  # type: ignore[return-value]
