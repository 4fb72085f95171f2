"""Does a batch answer each prompt as if it were alone? Token for token."""

import pytest
import torch

from component.error import UserError
from component.inference.batch import check_batch, generate_batch, greedy_batch
from component.inference.block_attention import NAME
from component.inference.generate import generate
from component.rope import extend_context
from tests.conftest import TEXTS, build_llama
from tests.generation_flags import GREEDY, flags
from tests.reference.greedy import stock

PROMPTS = [TEXTS[0], "The", "Half of the heads attend", TEXTS[4], "A"]
SEEDS = [3, 4, 5, 6, 7]
LONG = ("--max_new_tokens", "20")


@pytest.fixture
def model(tiny_llama_config):
    extend_context(tiny_llama_config, 128)
    return build_llama(tiny_llama_config).eval()


@pytest.fixture
def prompts(tokenizer):
    found = [tokenizer(text).input_ids for text in PROMPTS]
    assert len(set(map(len, found))) > 3, "padding is needed"
    return found


@pytest.mark.parametrize("penalty", ["1.0", "1.4"])
def test_greedy_answers_are_those_of_each_alone(penalty, model, tokenizer, prompts):
    """Padding is the end-of-sequence token; a penalty must not see it."""
    words = flags(*GREEDY, *LONG, "--repetition_penalty", penalty)
    texts = generate_batch(model, tokenizer, prompts, SEEDS, words)
    assert texts == [generate(model, tokenizer, ids, words, str) for ids in prompts]
    tokens = [stock(model, ids, max_new_tokens=20, repetition_penalty=float(penalty)) for ids in prompts]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]


@pytest.mark.parametrize("cache", ["dynamic", "int4"])
def test_a_single_prompt_is_read_as_estimated(cache, tiny_llama_config, tokenizer):
    """In forward passes of `prefill_tokens`, as when it is not in a file; quantized answers depend on them."""
    extend_context(tiny_llama_config, 512)
    tiny_llama_config._attn_implementation = NAME
    model = build_llama(tiny_llama_config).eval()
    words, lengths = flags(*GREEDY, *LONG, "--cache_implementation", cache), []
    words.prefill_tokens = 64
    prompt = torch.randint(2, 300, (150,)).tolist()
    expected = generate(model, tokenizer, prompt, words, str)
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    assert generate_batch(model, tokenizer, [prompt], [0], words) == [expected]
    assert lengths[:4] == [64, 64, 22, 1]


def test_greedy_ids_beyond_the_context(model, tokenizer, prompts):
    """In a context of 128 tokens, one prompt fills it, and one row ends early."""
    prompts = [*prompts, [0, *range(20, 200)]]
    answers = [stock(model, ids, max_new_tokens=9) for ids in prompts]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(answers[2][3])
    found = greedy_batch(model, tokenizer, prompts, 9)
    end = answers[2][3]
    assert found == [ids[: ids.index(end) + 1] if end in ids else ids for ids in answers]
    assert len(found[2]) < 9


def test_rows_that_end_early_end_there(model, tokenizer, prompts):
    answers = [stock(model, ids, max_new_tokens=20) for ids in prompts]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(answers[2][3])
    words = flags(*GREEDY, *LONG)
    texts = generate_batch(model, tokenizer, prompts, SEEDS, words)
    assert texts == [generate(model, tokenizer, ids, words, str) for ids in prompts]
    assert texts[2] == tokenizer.decode(answers[2][: answers[2].index(answers[2][3]) + 1])


def test_stop_strings_of_each_row(model, tokenizer, prompts):
    whole = generate_batch(model, tokenizer, prompts, SEEDS, flags(*GREEDY, *LONG))
    words = flags(*GREEDY, *LONG, "--stop", whole[1][6:9], whole[3][10:12])
    texts = generate_batch(model, tokenizer, prompts, SEEDS, words)
    assert texts == [generate(model, tokenizer, ids, words, str) for ids in prompts]
    assert whole[1].startswith(texts[1])
    assert len(texts[1]) <= 6


def test_each_row_has_its_own_room(model, tokenizer):
    """In a context of 128 tokens, a prompt of 120 leaves 8 for its answer, and one of 20 leaves more."""
    prompts = [[0] + [5] * 119, [0] + [7] * 19]
    texts = generate_batch(model, tokenizer, prompts, [1, 2], flags(*GREEDY, "--max_new_tokens", "40"))
    tokens = [stock(model, prompts[0], max_new_tokens=8), stock(model, prompts[1], max_new_tokens=40)]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]


@pytest.mark.parametrize("more", [(), ("--top_k", "5", "--repetition_penalty", "1.2"), ("--top_p", "1")])
def test_sampled_answers_do_not_depend_on_the_batch(more, model, tokenizer, prompts):
    words = flags(*LONG, "--temperature", "2", *more)
    together = generate_batch(model, tokenizer, prompts, SEEDS, words)
    alone = [
        generate_batch(model, tokenizer, [ids], [seed], words)[0] for ids, seed in zip(prompts, SEEDS, strict=True)
    ]
    assert together == alone
    assert generate_batch(model, tokenizer, prompts, [seed + 1 for seed in SEEDS], words) != together


def test_samples_have_the_models_distribution(model, tokenizer):
    """20,000 draws of the first token, in one batch of equal prompts, against softmax with top-k and temperature."""
    ids = tokenizer("The dog").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1] / 2
    best = logits.topk(4)
    expected = torch.zeros_like(logits).scatter(0, best.indices, best.values.softmax(0))
    words = flags("--max_new_tokens", "1", "--temperature", "2", "--top_k", "4", "--top_p", "1")
    drawn: list[int] = []

    class Ids:  # a tokenizer that decodes nothing
        eos_token_id, bos_token_id, all_special_tokens, all_special_ids = 383, 0, (), ()

        def decode(self, row, **_):
            drawn.extend(row)
            return ""

    for first in range(0, 20_000, 1000):
        generate_batch(model, Ids(), [ids] * 1000, list(range(first, first + 1000)), words)
    shares = torch.bincount(torch.tensor(drawn), minlength=len(logits)) / len(drawn)
    assert len(drawn) == 20_000
    assert (shares - expected).abs().max() < 0.015


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_quantized_caches_are_refused(cache, model):
    words = flags("--cache_implementation", cache)
    words.batch_size = 2
    with pytest.raises(UserError, match=f"--batch_size: 2, but --cache_implementation {cache} quantizes rows"):
        check_batch(model.config, words)
    words.batch_size = 1
    check_batch(model.config, words)


def test_frequencies_of_the_longest_row_are_refused(tiny_llama_config):
    extend_context(tiny_llama_config, 128, "dynamic")
    words = flags()
    words.batch_size = 2
    with pytest.raises(UserError, match="--batch_size: 2, but the model's rotary frequencies depend on the length"):
        check_batch(tiny_llama_config, words)


def test_prompts_are_read_one_by_one(model, tokenizer, prompts):
    """A pass over many tokens has one row and no mask; a pass over all rows has one token each."""
    shapes = []

    def record(module, args, kwargs):
        shapes.append((tuple(kwargs["input_ids"].shape), kwargs.get("attention_mask") is None))

    hook = model.model.register_forward_pre_hook(record, with_kwargs=True)
    greedy_batch(model, tokenizer, prompts, 3)
    hook.remove()
    assert shapes[: len(prompts)] == [((1, len(prompt) - 1), True) for prompt in prompts]
    assert {shape for shape, _ in shapes[len(prompts) :]} == {(len(prompts), 1)}


def test_a_prompt_of_one_token(model, tokenizer):
    """There is nothing to read before its last token, and no pass over none."""
    prompts, lengths = [[5], [6, 7, 8]], []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    found = greedy_batch(model, tokenizer, prompts, 4)
    hook.remove()
    assert min(lengths) > 0
    assert found == [greedy_batch(model, tokenizer, [prompt], 4)[0] for prompt in prompts]
