"""How is text generated? Token for token as by stock transformers, in the programs too."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from component.error import UserError
from component.inference.block_attention import NAME
from component.inference.generate import Stopped, generate, stream_generation
from component.inference.kv_cache import PromptCache
from component.loading import load_for_inference
from component.rope import extend_context
from tests.conftest import TEXTS, build_llama
from tests.generation_flags import GREEDY, flags
from tests.reference.greedy import stock

INFERENCE = "script/inference/inference.py"
PROMPT = "Half of the heads attend"


@pytest.fixture
def continued(tokenizer, monkeypatch):
    """(new token ids, returned text) of `stream_generation`."""

    def run(model, prompt_ids: list[int], *words: str) -> tuple[list[int], str]:
        rows, generate = [], model.generate

        def recorded(*args, **kwargs):
            rows.append(generate(*args, **kwargs))
            return rows[-1]

        with monkeypatch.context() as patch:
            patch.setattr(model, "generate", recorded)
            text = stream_generation(model, tokenizer, prompt_ids, flags(*words))
        ((row,),) = rows
        assert row[: len(prompt_ids)].tolist() == prompt_ids
        return row[len(prompt_ids) :].tolist(), text

    return run


class TestGreedy:
    @pytest.mark.parametrize("penalty", [1.0, 1.3])
    def test_equals_stock_generation(self, penalty, continued, tiny_llama, tokenizer, capsys):
        prompt_ids = tokenizer(PROMPT).input_ids
        words = (*GREEDY, "--max_new_tokens", "20", "--repetition_penalty", str(penalty))
        ids, text = continued(tiny_llama, prompt_ids, *words)
        assert ids == stock(tiny_llama, prompt_ids, max_new_tokens=20, repetition_penalty=penalty)
        assert len(ids) > 1
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert capsys.readouterr().out == text + "\n", "the streamed text equals the returned text"

    @pytest.mark.parametrize("attention", ["sdpa", NAME])
    @pytest.mark.parametrize("tokens", [257, 256, 300])
    def test_a_prompt_read_in_parts(self, tokens, attention, tiny_llama_config, tokenizer, monkeypatch):
        tiny_llama_config.max_position_embeddings = 512
        model = build_llama(tiny_llama_config).eval()
        prompt_ids = torch.randint(5, 300, (tokens,)).tolist()
        expected = tokenizer.decode(stock(model, prompt_ids, max_new_tokens=20), skip_special_tokens=True)
        model.set_attn_implementation(attention)
        words, lengths = flags(*GREEDY, "--max_new_tokens", "20"), []
        words.prefill_tokens = 64
        model.get_decoder().register_forward_pre_hook(
            lambda module, inputs, options: lengths.append(options["input_ids"].shape[1]), with_kwargs=True
        )
        assert generate(model, tokenizer, prompt_ids, words, lambda text: None) == expected
        assert lengths[: -(-tokens // 64)] == [64] * ((tokens - 1) // 64) + [(tokens - 1) % 64 + 1]

    @pytest.mark.parametrize("implementation", ["int8", "int4"])
    def test_a_second_question(self, implementation, tiny_llama_config, tokenizer):
        """As with an empty cache; quantized, as the answer to a long prompt shows."""
        tiny_llama_config.max_position_embeddings = 512
        model = build_llama(tiny_llama_config).eval()
        words = flags(*GREEDY, "--max_new_tokens", "30", "--cache_implementation", implementation)
        document, question = torch.randint(5, 300, (300,)).tolist(), torch.randint(5, 300, (40,)).tolist()
        cache = PromptCache(model.config, implementation, chunk=64)
        first = generate(model, tokenizer, document, words, lambda text: None, cache=cache)
        second = document + tokenizer(first).input_ids[1:] + question
        found = generate(model, tokenizer, second, words, lambda text: None, cache=cache)
        empty = PromptCache(model.config, implementation, chunk=64)
        assert found == generate(model, tokenizer, second, words, lambda text: None, cache=empty)
        assert found

    def test_penalty_matters(self, continued, tiny_llama, tokenizer):
        prompt_ids = tokenizer(PROMPT).input_ids
        plain, _ = continued(tiny_llama, prompt_ids, *GREEDY, "--max_new_tokens", "20")
        other, _ = continued(tiny_llama, prompt_ids, *GREEDY, "--max_new_tokens", "20", "--repetition_penalty", "1.3")
        assert plain != other

    def test_the_models_generation_config_is_ignored(self, continued, tiny_llama, tokenizer):
        """LLaMA2 ships temperature and top_p, others a repetition penalty."""
        prompt_ids = tokenizer(PROMPT).input_ids
        expected = stock(tiny_llama, prompt_ids, max_new_tokens=20)
        tiny_llama.generation_config.update(do_sample=True, temperature=9.0, top_p=0.6, repetition_penalty=3.0)
        assert continued(tiny_llama, prompt_ids, *GREEDY, "--max_new_tokens", "20")[0] == expected

    def test_stops_at_the_end_of_sequence(self, continued, tiny_llama, tokenizer):
        prompt_ids = tokenizer(PROMPT).input_ids
        eos = stock(tiny_llama, prompt_ids, max_new_tokens=3)[1]
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
        ids, _ = continued(tiny_llama, prompt_ids, *GREEDY, "--max_new_tokens", "20")
        assert ids.index(eos) == len(ids) - 1
        assert len(ids) <= 2

    def test_an_adapter_and_its_context(self, continued, adapter_folder, base_folder, tokenizer):
        model, _ = load_for_inference(None, str(adapter_folder))
        prompt_ids = tokenizer(PROMPT).input_ids
        ids, _ = continued(model, prompt_ids, *GREEDY, "--max_new_tokens", "20")
        assert ids == stock(model, prompt_ids, max_new_tokens=20)
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        assert ids != stock(base, prompt_ids, max_new_tokens=20), "the adapter changes the output"


class TestSampling:
    def test_the_seed_decides(self, base_folder, run_program):
        def text(seed: int) -> str:
            words = ("--model_name_or_path", base_folder, "--max_new_tokens", 20, "--temperature", 2, "--seed", seed)
            return run_program(INFERENCE, *words, stdin=PROMPT.encode()).out

        assert text(1) == text(1)
        assert text(1) != text(2)

    def test_flags_arrive(self, tiny_llama, tokenizer, monkeypatch):
        seen = {}

        def generate(**kwargs):
            seen.update(kwargs["generation_config"].to_dict())
            return kwargs["input_ids"]

        monkeypatch.setattr(tiny_llama, "generate", generate)
        words = ["--temperature", "0.7", "--top_p", "0.8", "--repetition_penalty", "1.1", "--max_new_tokens", "7"]
        stream_generation(tiny_llama, tokenizer, [0, 5], flags(*words))
        wanted = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.1, "max_new_tokens": 7, "do_sample": True}
        assert {name: seen[name] for name in wanted} == wanted


class TestContext:
    def test_generation_stops_at_the_end_of_the_context(self, continued, tiny_llama):
        ids, _ = continued(tiny_llama, [0] + [5] * 59, *GREEDY, "--max_new_tokens", "500")
        assert 1 <= len(ids) <= 4

    @pytest.mark.parametrize("length", [64, 65, 300])
    def test_prompts_that_fill_the_context_are_refused(self, length, tiny_llama, tokenizer):
        with pytest.raises(UserError, match=rf"{length} tokens.* 64"):
            stream_generation(tiny_llama, tokenizer, [0] * length, flags(*GREEDY))

    def test_an_extended_model_takes_longer_prompts(self, continued, tiny_llama_config):
        extend_context(tiny_llama_config, 256)
        model = build_llama(tiny_llama_config).eval()
        prompt_ids = [0] + [5] * 199
        ids, _ = continued(model, prompt_ids, *GREEDY, "--max_new_tokens", "9")
        assert ids == stock(model, prompt_ids, max_new_tokens=9)

    def test_a_merged_model_beyond_its_bases_length(self, adapter_folder, tmp_path, continued, tokenizer, run_program):
        """A base of 64 tokens extended to 128, filled to the last token; compared with stock transformers."""
        words = ("--adapter_name_or_path", adapter_folder, "--save_path", tmp_path / "merged", "--dtype", "float32")
        outcome = run_program("script/merge_lora.py", *words)
        assert outcome.status == 0, outcome.err
        prompt_ids = (tokenizer(" ".join(TEXTS)).input_ids * 2)[:100]
        expected = stock(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), prompt_ids, max_new_tokens=28)
        model, _ = load_for_inference(str(tmp_path / "merged"))
        ids, _ = continued(model, prompt_ids, *GREEDY, "--max_new_tokens", "500")
        assert ids == expected
        assert 100 + len(ids) == 128, "the end of the context, not of the sequence"


class TestConversationCache:
    def test_a_second_turn_is_the_same_without_the_cache(self, tiny_llama, tokenizer, monkeypatch):
        cache, words = PromptCache(tiny_llama.config), flags(*GREEDY, "--max_new_tokens", "6")
        first = tokenizer(PROMPT).input_ids
        answer = generate(tiny_llama, tokenizer, first, words, str, cache=cache)
        second = [*first, *tokenizer(answer, add_special_tokens=False).input_ids, 9, 9, 9]
        lengths, forward = [], tiny_llama.forward

        def counted(input_ids, **kwargs):
            lengths.append(input_ids.shape[1])
            return forward(input_ids=input_ids, **kwargs)

        monkeypatch.setattr(tiny_llama, "forward", counted)
        text = generate(tiny_llama, tokenizer, second, words, str, cache=cache)
        assert lengths[0] < len(second) - len(first), "the first turn is not recomputed"
        assert text == generate(tiny_llama, tokenizer, second, words, str)

    def test_without_a_cache_of_the_caller(self, tiny_llama, tokenizer):
        pieces = []
        words = flags(*GREEDY, "--max_new_tokens", "6")
        text = generate(tiny_llama, tokenizer, tokenizer(PROMPT).input_ids, words, pieces.append)
        assert "".join(pieces) == text != ""


class TestStopping:
    def test_on_request(self, tiny_llama, tokenizer):
        prompt_ids, calls = tokenizer(PROMPT).input_ids, []

        def should_stop() -> bool:
            calls.append(True)
            return len(calls) == 3

        words = flags(*GREEDY, "--max_new_tokens", "20")
        text = generate(tiny_llama, tokenizer, prompt_ids, words, str, should_stop=should_stop)
        assert text == tokenizer.decode(stock(tiny_llama, prompt_ids, max_new_tokens=3), skip_special_tokens=True)

    def test_by_ctrl_c(self, tiny_llama, tokenizer, monkeypatch, capsys):
        """The text so far is printed and kept; the cache, whose layers may differ in length, is not."""
        prompt_ids, forward, calls = tokenizer(PROMPT).input_ids, tiny_llama.forward, []
        expected = tokenizer.decode(stock(tiny_llama, prompt_ids, max_new_tokens=4), skip_special_tokens=True)

        def interrupted(**kwargs):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return forward(**kwargs)

        monkeypatch.setattr(tiny_llama, "forward", interrupted)
        cache = PromptCache(tiny_llama.config)
        with pytest.raises(Stopped) as stopped:
            stream_generation(tiny_llama, tokenizer, prompt_ids, flags(*GREEDY), cache)
        assert stopped.value.text == expected != ""
        assert capsys.readouterr().out == expected + "\n"
        assert cache.nbytes == 0


class TestWhatTheModelKnows:
    """Settings and tokens that belong to the model, not to the tokenizer or to transformers' defaults."""

    @pytest.mark.parametrize(("words", "expected"), [((), 0), (("--top_k", "7"), 7)])
    def test_top_k(self, words, expected, tiny_llama, tokenizer, monkeypatch):
        """K9a: transformers fills in 50 where nothing is said."""
        seen = {}

        def generate(**kwargs):
            seen["top_k"] = kwargs["generation_config"].top_k
            return kwargs["input_ids"]

        monkeypatch.setattr(tiny_llama, "generate", generate)
        stream_generation(tiny_llama, tokenizer, tokenizer(PROMPT).input_ids, flags(*words))
        assert seen == {"top_k": expected}

    @pytest.mark.parametrize("place", ["generation_config", "config"])
    def test_every_token_that_ends_a_text(self, place, continued, tiny_llama, tokenizer):
        """K2b: Llama-3's chats end with one of several tokens; only the tokenizer's was known."""
        prompt_ids = tokenizer(PROMPT).input_ids
        third = stock(tiny_llama, prompt_ids, max_new_tokens=3)[2]
        getattr(tiny_llama, place).eos_token_id = [tokenizer.eos_token_id, third]
        ids, _ = continued(tiny_llama, prompt_ids, *GREEDY, "--max_new_tokens", "20")
        assert ids.index(third) == len(ids) - 1
        assert len(ids) <= 3

    def test_a_token_that_the_model_lacks(self, continued, tiny_llama, tokenizer):
        """K2a: an IndexError."""
        rows = tiny_llama.config.vocab_size
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        with pytest.raises(UserError, match=rf"token {rows} \(<\|im_start\|>\), beyond the model's {rows} embedding"):
            continued(tiny_llama, tokenizer("<|im_start|> a").input_ids, *GREEDY)
