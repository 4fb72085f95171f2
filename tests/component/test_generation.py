"""How is text continued? Token for token as Hugging Face continues it, in the programs that people start."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from component.cli import boolean
from component.data.chat_template import encode_chat
from component.error import UserError
from component.inference.context import truncate_prompt
from component.inference.flags import check_attention, generation_parser, load_from_flags
from component.inference.generate import Stopped, generate, stream_generation
from component.inference.kv_cache import PromptCache
from component.loading import load_for_inference
from component.rope import extend_context
from tests.conftest import TEXTS, build_llama

ROOT = Path(__file__).resolve().parents[2]
INFERENCE, CHAT = "script/inference/inference.py", "script/inference/chat.py"
PROMPT = "Half of the heads attend"


def flags(*words: str):
    return generation_parser("").parse_args(words)


GREEDY = ("--do_sample", "false")


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


def stock(model, prompt_ids: list[int], **kwargs) -> list[int]:
    """Greedy, by Hugging Face alone."""
    ids = torch.tensor([prompt_ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=1, eos_token_id=1, **kwargs
    )
    return out[0, len(prompt_ids) :].tolist()


class TestGreedy:
    @pytest.mark.parametrize("penalty", [1.0, 1.3])
    def test_equals_stock_generation(self, penalty, continued, tiny_llama, tokenizer, capsys):
        prompt_ids = tokenizer(PROMPT).input_ids
        words = (*GREEDY, "--max_new_tokens", "20", "--repetition_penalty", str(penalty))
        ids, text = continued(tiny_llama, prompt_ids, *words)
        assert ids == stock(tiny_llama, prompt_ids, max_new_tokens=20, repetition_penalty=penalty)
        assert len(ids) > 1
        assert text == tokenizer.decode(ids, skip_special_tokens=True)
        assert capsys.readouterr().out == text + "\n", "streamed is what is returned"

    def test_penalty_matters(self, continued, tiny_llama, tokenizer):
        prompt_ids = tokenizer(PROMPT).input_ids
        plain, _ = continued(tiny_llama, prompt_ids, *GREEDY, "--max_new_tokens", "20")
        other, _ = continued(tiny_llama, prompt_ids, *GREEDY, "--max_new_tokens", "20", "--repetition_penalty", "1.3")
        assert plain != other

    def test_a_bases_own_sampling_values_change_nothing(self, continued, tiny_llama, tokenizer):
        """LLaMA2 ships temperature and top_p, others a repetition penalty."""
        prompt_ids = tokenizer(PROMPT).input_ids
        expected = stock(tiny_llama, prompt_ids, max_new_tokens=20)
        tiny_llama.generation_config.update(do_sample=True, temperature=9.0, top_p=0.6, repetition_penalty=3.0)
        assert continued(tiny_llama, prompt_ids, *GREEDY, "--max_new_tokens", "20")[0] == expected

    def test_stops_at_the_end_of_sequence(self, continued, tiny_llama, tokenizer):
        prompt_ids = tokenizer(PROMPT).input_ids
        ends = stock(tiny_llama, prompt_ids, max_new_tokens=3)[1]
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends)
        ids, _ = continued(tiny_llama, prompt_ids, *GREEDY, "--max_new_tokens", "20")
        assert ids.index(ends) == len(ids) - 1
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

    def test_defaults_are_the_originals(self):
        kept = vars(flags())
        original = {"temperature": 0.35, "top_p": 0.9, "repetition_penalty": 1.0, "max_new_tokens": 500}
        assert {name: kept[name] for name in original} == original
        assert kept["do_sample"] is True
        assert kept["load_in_4bit"] is False

    @pytest.mark.parametrize(
        ("words", "value"),
        [
            ([], False),
            (["--load_in_4bit"], True),
            (["--load_in_4bit", "True"], True),
            (["--load_in_4bit", "false"], False),
        ],
    )
    def test_booleans_stand_alone_or_with_a_value(self, words, value):
        assert flags(*words).load_in_4bit is value

    def test_boolean_false_is_false(self):
        """The original's `type=bool` took every non-empty text for true."""
        assert boolean("False") is False


class TestContext:
    def test_what_is_generated_ends_with_the_context(self, continued, tiny_llama):
        ids, _ = continued(tiny_llama, [0] + [5] * 59, *GREEDY, "--max_new_tokens", "500")
        assert 1 <= len(ids) <= 4

    @pytest.mark.parametrize("length", [64, 65, 300])
    def test_prompts_that_leave_no_room_are_refused(self, length, tiny_llama, tokenizer):
        with pytest.raises(UserError, match=rf"{length} tokens.* 64"):
            stream_generation(tiny_llama, tokenizer, [0] * length, flags(*GREEDY))

    def test_a_stretched_model_has_room_for_more(self, continued, tiny_llama_config):
        extend_context(tiny_llama_config, 256)
        model = build_llama(tiny_llama_config).eval()
        prompt_ids = [0] + [5] * 199
        ids, _ = continued(model, prompt_ids, *GREEDY, "--max_new_tokens", "9")
        assert ids == stock(model, prompt_ids, max_new_tokens=9)

    def test_a_merged_model_beyond_its_bases_length(self, adapter_folder, tmp_path, continued, tokenizer, run_program):
        """Of 64 tokens once, filled to the last of 128; beside it stock transformers alone."""
        words = ("--adapter_name_or_path", adapter_folder, "--save_path", tmp_path / "merged", "--dtype", "float32")
        outcome = run_program("script/merge_lora.py", *words)
        assert outcome.status == 0, outcome.err
        prompt_ids = (tokenizer(" ".join(TEXTS)).input_ids * 2)[:100]
        expected = stock(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), prompt_ids, max_new_tokens=28)
        model, _ = load_for_inference(str(tmp_path / "merged"))
        ids, _ = continued(model, prompt_ids, *GREEDY, "--max_new_tokens", "500")
        assert ids == expected
        assert 100 + len(ids) == 128, "the end of the context, not of the sequence"

    @pytest.mark.parametrize("how", ["middle", "left"])
    def test_what_is_cut(self, how, tiny_llama, capsys):
        """An answer may have 500 tokens, but no more than a quarter of the context, 16 of 64, is kept free for it."""
        prompt_ids = list(range(3, 103))
        kept = truncate_prompt(tiny_llama, prompt_ids, flags("--truncate", how))
        assert (
            kept
            == {
                "middle": prompt_ids[:24] + prompt_ids[-24:],
                "left": prompt_ids[:1] + prompt_ids[-47:],
            }[how]
        )
        place = {"middle": "middle", "left": "start"}[how]
        assert capsys.readouterr().err == f"52 tokens cut from the {place} of a prompt of 100\n"


class TestConversationCache:
    def test_a_second_turn_says_what_it_says_without_the_first_ones_cache(self, tiny_llama, tokenizer, monkeypatch):
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
        assert lengths[0] < len(second) - len(first), "what the first turn computed is not computed again"
        assert text == generate(tiny_llama, tokenizer, second, words, str)

    def test_the_default_needs_no_cache_of_the_caller(self, tiny_llama, tokenizer):
        pieces = []
        words = flags(*GREEDY, "--max_new_tokens", "6")
        text = generate(tiny_llama, tokenizer, tokenizer(PROMPT).input_ids, words, pieces.append)
        assert "".join(pieces) == text != ""


class TestStopping:
    def test_when_asked(self, tiny_llama, tokenizer):
        prompt_ids, asked = tokenizer(PROMPT).input_ids, []

        def should_stop() -> bool:
            asked.append(True)
            return len(asked) == 3

        words = flags(*GREEDY, "--max_new_tokens", "20")
        text = generate(tiny_llama, tokenizer, prompt_ids, words, str, should_stop=should_stop)
        assert text == tokenizer.decode(stock(tiny_llama, prompt_ids, max_new_tokens=3), skip_special_tokens=True)

    def test_by_ctrl_c(self, tiny_llama, tokenizer, monkeypatch, capsys):
        """What had come is printed and kept; the cache, half of whose layers may know more, is not."""
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
        assert cache.bytes_held == 0


class TestAttention:
    def test_a_kernel_by_name(self, base_folder):
        model, _ = load_from_flags(flags("--model_name_or_path", str(base_folder), "--attn_implementation", "eager"))
        assert model.config._attn_implementation == "eager"

    def test_under_an_adapter(self, adapter_folder):
        words = ("--adapter_name_or_path", str(adapter_folder), "--attn_implementation", "eager")
        assert load_from_flags(flags(*words))[0].get_base_model().config._attn_implementation == "eager"

    @pytest.mark.parametrize(("has_gpu", "lack"), [(False, "no CUDA GPU"), (True, "no package flash_attn")])
    def test_one_that_is_not_here(self, has_gpu, lack, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=f"--attn_implementation: flash_attention_2, but there is {lack} here"):
            check_attention("flash_attention_2")


@pytest.fixture
def prompts_seen(monkeypatch):
    """The prompts that a program continues; each is answered with "An answer."."""
    seen = []

    def answer(model, tokenizer, prompt_ids, flags, cache):
        seen.append(prompt_ids)
        return "An answer."

    monkeypatch.setattr("component.inference.generate.stream_generation", answer)
    return seen


class TestChat:
    def run(self, run_program, base_folder, stdin: bytes):
        return run_program(CHAT, "--model_name_or_path", base_folder, "--context_size", 512, stdin=stdin)

    def test_the_conversation_is_kept(self, run_program, base_folder, prompts_seen, tokenizer):
        outcome = self.run(run_program, base_folder, b"One?\n\nTwo?\n")
        assert outcome.status == 0
        first, second = prompts_seen
        assert first == encode_chat(tokenizer, [("One?", None)])[0]
        turn, _ = encode_chat(tokenizer, [("One?", "An answer.")])
        assert second[: len(turn)] == turn
        assert second == encode_chat(tokenizer, [("One?", "An answer."), ("Two?", None)])[0]

    def test_until_it_is_cleared(self, run_program, base_folder, prompts_seen, tokenizer):
        self.run(run_program, base_folder, b"One?\n/clear\nTwo?\n")
        assert prompts_seen[1] == encode_chat(tokenizer, [("Two?", None)])[0]

    def test_exit_leaves(self, run_program, base_folder, prompts_seen):
        outcome = self.run(run_program, base_folder, b"One?\n/exit\nTwo?\n")
        assert (outcome.status, len(prompts_seen)) == (0, 1)

    def test_training_and_chat_spell_alike(self, run_program, base_folder, prompts_seen, tokenizer):
        """The ids of a chat's first prompt are those in front of the answer in a training sample."""
        self.run(run_program, base_folder, "Größe?\n".encode())
        ids, labels = encode_chat(tokenizer, [("Größe?", "So.")])
        assert prompts_seen[0] == [token for token, label in zip(ids, labels, strict=True) if label == -100]

    def test_the_models_own_spelling_if_it_was_trained_with_it(
        self, run_program, base_folder, prompts_seen, tokenizer, tmp_path
    ):
        folder = shutil.copytree(base_folder, tmp_path / "chatty")
        spelling = "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
        (folder / "chat_template.jinja").write_text(spelling + "{% if add_generation_prompt %}assistant> {% endif %}")
        record = {"base_model": "x", "rope_type": "default", "rope_factor": 1.0, "template": "tokenizer", "files": {}}
        (folder / "longqlora.json").write_text(json.dumps(record))
        outcome = run_program(CHAT, "--model_name_or_path", folder, stdin=b"One?\nTwo?\n")
        assert outcome.status == 0, outcome.err
        text = "user> One?\nassistant> An answer.\nuser> Two?\nassistant> "
        assert prompts_seen[1] == tokenizer(text, add_special_tokens=False).input_ids


class TestInference:
    def test_all_of_standard_input_is_one_prompt(self, run_program, base_folder, prompts_seen, tokenizer):
        text = "The dog.\n\nAnd the «fox»"
        outcome = run_program(INFERENCE, "--model_name_or_path", base_folder, stdin=text.encode())
        assert outcome.status == 0
        assert prompts_seen == [tokenizer(text).input_ids]
        assert prompts_seen[0][0] == tokenizer.bos_token_id

    def test_a_prompt_file(self, run_program, base_folder, prompts_seen, tokenizer, tmp_path):
        (tmp_path / "book.txt").write_text("The dog.")
        run_program(INFERENCE, "--model_name_or_path", base_folder, "--prompt_file", tmp_path / "book.txt")
        assert prompts_seen == [tokenizer("The dog.").input_ids]


class TestWhichModel:
    """Without flags: the newest finished run under output/, merged if it has been."""

    @pytest.fixture
    def output(self, tmp_path, adapter_folder, monkeypatch):
        root = tmp_path / "output"
        for age, name in enumerate(["newest", "older"]):
            record = Path(shutil.copytree(adapter_folder, root / name)) / "longqlora.json"
            os.utime(record, (1e9 - age, 1e9 - age))
        unfinished = Path(shutil.copytree(adapter_folder, root / "unfinished"))
        (unfinished / "longqlora.json").unlink()
        monkeypatch.setattr("component.checkpoint.newest_run.__defaults__", (root,))
        return root

    @pytest.mark.parametrize("program", [INFERENCE, CHAT])
    def test_the_newest_runs_adapter(self, program, output, run_program, prompts_seen):
        outcome = run_program(program, stdin=b"The dog\n")
        assert outcome.status == 0
        assert str(output / "newest") in outcome.err
        assert len(prompts_seen) == 1

    def test_its_merged_model(self, output, base_folder, run_program, prompts_seen):
        shutil.copytree(base_folder, output / "newest-merged")
        outcome = run_program(INFERENCE, stdin=b"The dog")
        assert str(output / "newest-merged") in outcome.err

    def test_not_a_merged_model_of_an_earlier_training(self, output, base_folder, run_program, prompts_seen):
        merged = Path(shutil.copytree(base_folder, output / "newest-merged"))
        shutil.copy(output / "newest" / "longqlora.json", merged / "longqlora.json")
        os.utime(merged / "longqlora.json", (9e8, 9e8))  # the run is newer: it was trained again
        outcome = run_program(INFERENCE, stdin=b"The dog")
        assert str(output / "newest") in outcome.err
        assert "newest-merged" not in outcome.err.split("\n")[0]


PIPES = {
    INFERENCE: (["--adapter_name_or_path", "{adapter}"], b"The quick brown"),
    CHAT: (["--model_name_or_path", "{base}", "--context_size", "512"], b"One?\nTwo?\n"),
}


@pytest.mark.parametrize("program", PIPES, ids=["inference", "chat"])
def test_a_pipe_into_a_real_process_ends_with_status_0(program, adapter_folder, base_folder, tmp_path):
    words, stdin = PIPES[program]
    words = [word.format(adapter=adapter_folder, base=base_folder) for word in words]
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *words, *GREEDY, "--max_new_tokens", "3"],
        input=stdin,
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert "Traceback" not in done.stderr.decode()
    if program == CHAT:
        assert done.stdout.count(b"ASSISTANT: ") == 2
        return
    model, tokenizer = load_for_inference(None, str(adapter_folder))
    ids = stock(model, tokenizer(stdin.decode()).input_ids, max_new_tokens=3)
    assert done.stdout.decode() == tokenizer.decode(ids, skip_special_tokens=True) + "\n", "the text and nothing else"


@pytest.mark.parametrize("program", [INFERENCE, CHAT], ids=["inference", "chat"])
@pytest.mark.parametrize("stdin", [b"", b"\n \n"], ids=["nothing", "blank lines"])
def test_no_prompt_at_all_is_no_mistake(program, stdin, run_program, base_folder):
    outcome = run_program(program, "--model_name_or_path", base_folder, stdin=stdin)
    assert (outcome.status, outcome.out.strip()) == (0, "")
