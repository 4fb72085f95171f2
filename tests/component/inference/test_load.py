"""Which flags do inference and chat take, and which model do they name?"""

import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig

from component.error import UserError
from component.inference.block_attention import NAME
from component.inference.cache_memory import KERNELS_GIB
from component.inference.generate import generate
from component.inference.load import check_attention, fit_cache, load_from_flags
from component.memory.plan import IDLE_GIB
from component.rope import extend_context
from tests.generation_flags import flags
from tests.reference.greedy import stock

INFERENCE, CHAT = "script/inference/inference.py", "script/inference/chat.py"


class TestAttention:
    def test_an_implementation_by_name(self, base_folder):
        model, _ = load_from_flags(flags("--model_name_or_path", str(base_folder), "--attn_implementation", "eager"))
        assert model.config._attn_implementation == "eager"

    def test_under_an_adapter(self, adapter_folder):
        words = ("--adapter_name_or_path", str(adapter_folder), "--attn_implementation", "eager")
        assert load_from_flags(flags(*words))[0].get_base_model().config._attn_implementation == "eager"

    @pytest.mark.parametrize(("has_gpu", "missing"), [(False, "no CUDA GPU"), (True, "no package flash_attn")])
    def test_one_that_is_not_available(self, has_gpu, missing, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match=f"--attn_implementation: flash_attention_2, but there is {missing} here"):
            check_attention("flash_attention_2")


class TestWhichModel:
    """Without flags: the newest finished run under output/, its merged model if there is one."""

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

    def test_not_the_merged_model_of_an_earlier_run(self, output, base_folder, run_program, prompts_seen):
        merged = Path(shutil.copytree(base_folder, output / "newest-merged"))
        shutil.copy(output / "newest" / "longqlora.json", merged / "longqlora.json")
        os.utime(merged / "longqlora.json", (9e8, 9e8))  # older than the run, which was trained again
        outcome = run_program(INFERENCE, stdin=b"The dog")
        assert str(output / "newest") in outcome.err
        assert "newest-merged" not in outcome.err.split("\n")[0]


def test_defaults_are_the_originals():
    original = {"temperature": 0.35, "top_p": 0.9, "repetition_penalty": 1.0, "max_new_tokens": 500}
    original |= {"do_sample": True, "load_in_4bit": False}
    assert {name: vars(flags())[name] for name in original} == original


@pytest.mark.parametrize(("values", "expected"), [([], True), (["True"], True), (["false"], False)])
def test_booleans_stand_alone_or_with_a_value(values, expected):
    assert flags("--load_in_4bit", *values).load_in_4bit is expected


class TestFitCache:
    """Which cache `auto` means; the GPU's free memory is set here, the rest is calculated."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        def free(mib: float) -> None:
            gpu = (IDLE_GIB + KERNELS_GIB) * 2**30 + mib * 2**20
            monkeypatch.setattr("component.inference.load.available_memory", lambda device: (gpu, 2**40))

        return free

    def chosen(self, folder, tokens: int, *words: str):
        found = flags("--model_name_or_path", str(folder), "--cache_implementation", "auto", *words)
        fit_cache(found, tokens)
        return found

    @pytest.fixture
    def long_base(self, own_base):
        config = AutoConfig.from_pretrained(own_base)
        extend_context(config, 2**20)
        config.save_pretrained(own_base)
        return own_base

    def test_on_a_cpu_it_is_dynamic(self, base_folder, capsys):
        found = self.chosen(base_folder, 10)
        assert (found.cache_implementation, found.prefill_tokens) == ("dynamic", 4096)
        assert "KV cache: dynamic; at 10 tokens" in capsys.readouterr().err

    def test_a_prompt_that_is_read_at_once(self, own_base):
        """With frequencies that depend on the length, in whatever number of tokens: the prompt's and its answer's."""
        config = AutoConfig.from_pretrained(own_base)
        extend_context(config, 256, "dynamic")
        config.save_pretrained(own_base)
        found = self.chosen(own_base, 11, "--max_new_tokens", "4", "--do_sample", "false")
        model, tokenizer = load_from_flags(found)
        ids = tokenizer("The dog").input_ids
        expected = tokenizer.decode(stock(model, ids, max_new_tokens=4), skip_special_tokens=True)
        assert generate(model, tokenizer, ids, found, lambda piece: None) == expected

    def test_by_free_memory(self, long_base, gpu, capsys):
        """fp32: 256 bytes per token of 2 layers x 2 x 16 numbers; 64 and 36 of scales in 8 bits."""
        gpu(1000)
        assert self.chosen(long_base, 2**20).cache_implementation == "dynamic"
        gpu(200)
        assert self.chosen(long_base, 2**20).cache_implementation == "int8"
        assert "KV cache: int8, as dynamic does not fit; at 1048576 tokens 0.1 GiB" in capsys.readouterr().err
        assert self.chosen(long_base, 2**18).cache_implementation == "dynamic"
        assert self.chosen(long_base, 2**30).cache_implementation == "int8", "a text is no longer than the context"

    def test_eager_attention_needs_more(self, long_base, gpu):
        """A forward pass of 512 tokens has scores of 4 heads for each of 65536 tokens."""
        gpu(2000)
        for words, chunk in (((), 4096), (("--attn_implementation", "eager"), 512)):
            assert self.chosen(long_base, 2**12, *words).prefill_tokens == 4096
            found = flags("--model_name_or_path", str(long_base), *words)
            fit_cache(found, 2**16)
            assert found.prefill_tokens == chunk

    def test_none_fits(self, long_base, gpu, monkeypatch):
        gpu(-1)
        monkeypatch.setattr("component.model.load_base", None)  # no weight is loaded
        with pytest.raises(UserError, match=r"--cache_implementation: auto finds none for 1048576 tokens: fp8 needs"):
            load_from_flags(flags("--model_name_or_path", str(long_base), "--cache_implementation", "auto"))

    def test_a_part_of_the_context(self, long_base, gpu, capsys):
        gpu(20)
        found = flags("--model_name_or_path", str(long_base), "--cache_implementation", "auto")
        fit_cache(found)
        assert found.cache_implementation == "fp8"  # in fp32, scales of integers take more
        assert "longer texts do not fit, of the model's 1048576" in capsys.readouterr().err
        with pytest.raises(UserError, match="finds none for 1048576 tokens"):
            self.chosen(long_base, 2**20)

    def test_a_named_cache_is_tried(self, long_base, gpu):
        gpu(1)
        found = flags("--model_name_or_path", str(long_base), "--cache_implementation", "int8")
        fit_cache(found)
        assert (found.cache_implementation, found.prefill_tokens) == ("int8", 512)

    def test_a_budget_without_a_gpu(self, base_folder, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(UserError, match=r"--memory_budget_gib: 32\.0 GiB, but there is no GPU"):
            self.chosen(base_folder, 10, "--memory_budget_gib", "32")

    def test_attention(self, base_folder):
        assert load_from_flags(flags("--model_name_or_path", str(base_folder)))[0].config._attn_implementation == NAME
