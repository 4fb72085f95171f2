"""estimate_memory.py: what it prints, and its JSON."""

import json

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig

from script.estimate_memory import main

FP8 = ("--frozen_matmul", "fp8")
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.fixture
def estimate(tmp_path, monkeypatch, capsys):
    LlamaConfig(**SEVEN, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "7b")

    def run(*flags: str) -> tuple[dict, str]:
        file = tmp_path / "estimate.json"
        argv = ["estimate_memory.py", "--model_name_or_path", str(tmp_path / "7b"), "--output_json", str(file), *flags]
        file.unlink(missing_ok=True)
        monkeypatch.setattr("sys.argv", argv)
        main()
        return json.loads(file.read_text()), capsys.readouterr().out

    return run


def test_7b_at_8192_tokens_is_near_the_measurement(estimate):
    """Measured on an H200: 5.39 GiB with the minimum-memory plan, 30.6 of 32 GiB with the fastest; benchmark.json."""
    found, printed = estimate("--max_seq_length", "8192")
    fastest, minimum_memory_plan = found["plans"]
    assert 28 < fastest["peak_gib"] < 32
    assert 4.5 < minimum_memory_plan["peak_gib"] < 5.6
    assert found["workload"]["trained"] == 32 * 64 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert found["workload"]["weights"] == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert "fits" in printed
    assert f"about {found['longest_tokens']} tokens" in printed


def test_the_longest_sample_fits_and_a_longer_one_does_not(estimate):
    limits = ("--memory_budget_gib", "16", "--host_gib", "1000")
    found, _ = estimate("--max_seq_length", "8192", *limits)
    tokens = found["longest_tokens"]
    assert 65536 < tokens < 262144
    for length, fits in ((tokens, True), (tokens + 4096, False)):
        again, printed = estimate("--max_seq_length", str(length), "--group_size_ratio", "1", *limits)
        assert (again["plans"][1]["peak_gib"] <= 0.98 * 16) is fits
        assert ("does NOT fit" in printed) is not fits


def test_a_row_over_several_gpus(estimate):
    """Half of a row needs about as much as a row of half the length; memory and pinned memory are per GPU."""
    plans = ("--group_size_ratio", "0.25", "--host_gib", "1000")
    alone, _ = estimate("--max_seq_length", "65536", *plans)
    half, printed = estimate("--max_seq_length", "131072", "--sequence_parallel_size", "2", *plans)
    assert half["workload"]["tokens"] == 65536
    mine, theirs = (found["plans"][1] for found in (half, alone))  # the fastest plans trade memory for time
    assert 0 <= mine["peak_gib"] - theirs["peak_gib"] < 1
    assert mine["host_gib"] == pytest.approx(theirs["host_gib"], rel=0.1)
    assert half["longest_tokens"] == pytest.approx(2 * alone["longest_tokens"], rel=0.1)
    assert "on each GPU" in printed


def test_host_memory_is_a_limit_too(estimate):
    small, _ = estimate("--max_seq_length", "8192", "--host_gib", "8")
    large, _ = estimate("--max_seq_length", "8192", "--host_gib", "64")
    assert small["longest_tokens"] == 32768  # 32 layers of 4096 16-bit values: 256 KiB per token
    assert large["longest_tokens"] > small["longest_tokens"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max_seq_length", "8192", "--sequence_parallel_size", "0"), "--sequence_parallel_size: 0; use at least 1"),
        (
            ("--max_seq_length", "8192", "--sequence_parallel_size", "10000"),
            "--sequence_parallel_size: 10000 GPUs for rows of 8192 tokens",
        ),
        (("--max_seq_length", "8192", "--data_parallel_size", "0"), "--data_parallel_size: 0; use 1 or more"),
        (("--max_seq_length", "1"), "max_seq_length"),
        (("--max_seq_length", "8192", "--max_steps", "-1"), "--max_steps: -1; use 1 or more"),
        (("--max_seq_length", "8192", "--card", "rtx4900"), "--card: 'rtx4900' is none of"),
        (("--max_seq_length", "8192", "--card", ""), "--card: '' is none of"),
        (("--max_seq_length", "8192", "--memory_budget_gib", "inf"), "--memory_budget_gib: inf; use 0 or more, and a"),
        (("--max_seq_length", "8192", "--host_gib", "inf"), "--host_gib: inf; use 0 or more, and a finite number"),
        (
            ("--max_seq_length", "8192", "--card", "a100", "--frozen_matmul", "fp8"),
            "--frozen_matmul: a100 has no FP8; leave it out",
        ),
        (("--max_seq_length", "8192", "--full_attention_ratio", "2"), "--full_attention_ratio: 2.0; use a share"),
        (("--max_seq_length", "8192", "--gradient_accumulation_steps", "0"), "--gradient_accumulation_steps: 0; use"),
        (("--max_seq_length", "8192", "--target_modules", "q_prj"), "q_proj"),
        (("--max_seq_length", "8192", "--deepspeed", "nowhere.json"), "nowhere.json"),
        (("--max_seq_length", "8192", "--lora_rank", "0"), "lora_rank"),
    ],
)
def test_wrong_flags_are_named(estimate, capsys, flags, message):
    with pytest.raises(SystemExit):
        estimate(*flags)
    assert message in capsys.readouterr().err


def test_what_train_py_refuses_or_does_in_another_way(tmp_path, estimate, capsys):
    """Gemma 2 has layers of its own and sliding windows."""
    config = {"hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 96}
    Gemma2Config(**config, sliding_window=512).save_pretrained(tmp_path / "gemma2")
    words = ("--model_name_or_path", str(tmp_path / "gemma2"), "--max_seq_length", "8192")
    for more, message in (
        (FP8, "--frozen_matmul fp8, but memory plans, which multiply in FP8, do not support the decoder layers of "
         "model type 'gemma2'; leave it out"),
        (("--sequence_parallel_size", "2"), "--sequence_parallel_size: 2, but gemma2's own attention over rows"),
    ):  # fmt: skip
        with pytest.raises(SystemExit):
            estimate(*words, *more)
        assert message in capsys.readouterr().err
    assert "no memory plan supports gemma2: train.py runs Hugging Face's layers" in estimate(*words)[1]


def test_longest_is_0_if_the_weights_do_not_fit(estimate):
    found, printed = estimate("--max_seq_length", "8192", "--memory_budget_gib", "3")
    assert found["longest_tokens"] == 0
    assert "does NOT fit" in printed


@pytest.mark.parametrize("gib", ["-5", "nan"])
def test_k21_host_memory_below_zero(estimate, gib, capsys):
    with pytest.raises(SystemExit):
        estimate("--max_seq_length", "8192", "--host_gib", gib)
    assert f"error: --host_gib: {gib}; use 0 or more" in capsys.readouterr().err


def test_k21_it_works_from_another_folder(estimate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert estimate("--max_seq_length", "8192")[0]["longest_tokens"] > 8192


def test_k7_the_config_is_not_overwritten(tmp_path, estimate, capsys):
    config = tmp_path / "7b" / "config.json"
    before = config.read_bytes()
    with pytest.raises(SystemExit):
        estimate("--max_seq_length", "8192", "--output_json", str(config), "--overwrite")
    assert "would be overwritten, but --model_name_or_path reads it" in capsys.readouterr().err
    assert config.read_bytes() == before


class TestInference:
    """LLaMA2-7B: 32 layers of 2 x 4096 numbers per token."""

    NUMBERS = 32 * 2 * 4096
    LINEAR = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    EMBEDDINGS = 2 * 32000 * 4096

    def caches(self, estimate, *flags: str) -> tuple[dict[str, dict], str]:
        found, printed = estimate("--inference", *flags)
        return {row["cache"]: row for row in found["caches"]}, printed

    def test_by_hand(self, estimate):
        found, printed = self.caches(
            estimate, "--context", "114688", "--load_in_4bit", "--host_gib", "55"
        )  # 14 segments of 8192
        assert [name for name, row in found.items() if row["fits"]] == ["int4", "int2"]
        weights = self.LINEAR * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * self.EMBEDDINGS
        for row in found.values():
            assert row["weights_gib"] == pytest.approx(weights / 2**30)
            assert row["peak_gib"] == pytest.approx(row["weights_gib"] + row["cache_gib"] + row["workspace_gib"])
            assert f"{row['longest_tokens']}" in printed
        assert found["dynamic"]["cache_gib"] == 114688 * self.NUMBERS * 2 / 2**30 == 56
        recent = 64 * self.NUMBERS * 2 / 2**30  # tokens as computed
        assert found["int8"]["cache_gib"] == 56 / 16 * 8.5 + recent
        assert found["int4"]["cache_gib"] == 56 / 16 * 4.5 + recent
        assert (found["offloaded"]["cache_gib"], found["offloaded"]["host_gib"]) == (0, 56)
        assert found["int4"]["peak_gib"] == pytest.approx(3.8 + 15.75, abs=1.2)

    def test_the_longest_context_fits_and_a_longer_one_does_not(self, estimate):
        found, _ = self.caches(estimate, "--context", "8192", "--memory_budget_gib", "24", "--load_in_4bit")
        for name in ("dynamic", "int8", "int4", "offloaded"):
            tokens = found[name]["longest_tokens"]
            assert tokens > 8192
            for length, is_short in ((tokens, True), (tokens + 1024, False)):
                again, _ = self.caches(
                    estimate, "--context", str(length), "--memory_budget_gib", "24", "--load_in_4bit"
                )
                assert again[name]["fits"] is is_short, (name, length)
        assert found["dynamic"]["longest_tokens"] < found["int8"]["longest_tokens"] < found["int4"]["longest_tokens"]

    def test_positions_that_depend_on_the_length(self, estimate, tmp_path):
        """Read in one forward pass: what shorter ones need says nothing about whether a cache fits."""
        config = LlamaConfig(**SEVEN, rope_parameters={"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4})
        config.save_pretrained(tmp_path / "7b")
        flags = ("--memory_budget_gib", "24", "--load_in_4bit", "--host_gib", "1")
        for name, row in self.caches(estimate, "--context", "1024", *flags)[0].items():
            tokens = row["longest_tokens"]
            for length, is_short in ((tokens, True), (tokens + 1024, False)):
                again, _ = self.caches(estimate, "--context", str(length), *flags)
                assert again[name]["fits"] is is_short, (name, length)

    def test_a_small_model_is_estimated_at_once(self, estimate, tmp_path):
        """Hundreds of millions of its tokens fit."""
        LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4).save_pretrained(tmp_path / "7b")
        found, _ = self.caches(estimate, "--context", str(10**12))
        assert found["int4"]["longest_tokens"] > 10**8
        assert found["int4"]["cache_gib"] > found["int2"]["cache_gib"] > 10**12 * 64 / 4 / 2**30

    def test_16_bit_weights_and_the_models_context(self, estimate):
        found, printed = self.caches(estimate)
        assert printed.startswith("2048 tokens in 32 GiB of GPU"), "LlamaConfig's default"
        assert found["dynamic"]["weights_gib"] == 2 * (self.LINEAR + self.EMBEDDINGS) / 2**30

    def test_weights_stored_in_4_bits(self, estimate, tmp_path):
        in_4bit, _ = self.caches(estimate, "--load_in_4bit")
        file = tmp_path / "7b" / "config.json"
        stored = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
        file.write_text(json.dumps(json.loads(file.read_text()) | stored))
        assert self.caches(estimate)[0] == in_4bit

    def test_sliding_windows_are_never_quantized(self, estimate, tmp_path):
        config = MistralConfig(**SEVEN, sliding_window=4096, architectures=["MistralForCausalLM"])
        config.save_pretrained(tmp_path / "7b")
        found, printed = self.caches(estimate, "--context", "32768")
        assert list(found) == ["dynamic", "offloaded"]
        assert "cannot be quantized" in printed

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ((), "--max_seq_length: missing; name the tokens per sample, or estimate with --inference"),
            (("--inference", "--max_seq_length", "9"), "--max_seq_length: 9 is for training; with --inference use"),
            (("--max_seq_length", "9", "--context", "9"), "--context: 9, but no --inference"),
            (("--inference", "--context", "-9"), "--context: -9 tokens; use at least 1"),
            (("--inference", "--context", "0"), "--context: 0 tokens; use at least 1"),
            (("--max_seq_length", "9", "--context", "0"), "--context: 0, but no --inference"),
            (("--inference", "--card", "h100"), "--card: h100 is for training; with --inference leave it out"),
            (("--inference", "--no_4bit"), "--no_4bit: True is for training; with --inference leave it out"),
            (("--inference", "--memory_budget_gib", "nan"), "--memory_budget_gib: nan; use 0 or more"),
            (("--inference", "--memory_budget_gib", "inf"), "--memory_budget_gib: inf; use 0 or more, and a finite"),
            (("--inference", "--host_gib", "inf"), "--host_gib: inf; use 0 or more, and a finite number"),
        ],
    )
    def test_wrong_flags(self, estimate, capsys, flags, message):
        with pytest.raises(SystemExit):
            estimate(*flags)
        assert message in capsys.readouterr().err


def test_time_on_a_card(estimate):
    """LLaMA2-7B on an H200 took 2.67 s at 32768 tokens with S2-Attn, and 4.02 s with full attention."""
    words = ("--max_seq_length", "32768", "--card", "h200", "--max_steps", "500")
    zero = ("--deepspeed", "train_args/deepspeed/deepspeed_config_s2_no_offload.json", "--full_attention_ratio", "0.1")
    found, printed = estimate(*words, *zero)
    fastest, leanest = found["plans"]
    assert fastest["seconds_per_step"] == pytest.approx(2.67, rel=0.15)
    assert fastest["seconds_per_full_step"] == pytest.approx(4.02, rel=0.15)
    seconds = 450 * fastest["seconds_per_step"] + 50 * fastest["seconds_per_full_step"]
    assert fastest["hours"] == pytest.approx(seconds / 3600)
    assert leanest["seconds_per_step"] > fastest["seconds_per_step"]
    assert "time on h200, from its published rates: " in printed
    assert "per checkpoint" in printed


def test_cards_as_their_makers_write_them(estimate):
    said = [estimate("--max_seq_length", "8192", "--card", name)[0]["plans"] for name in ("rtx4090", "RTX 4090")]
    assert said[0] == said[1]
    assert said[0][0]["hours"] > 0


def test_float8_is_faster_on_a_card(estimate):
    words = ("--max_seq_length", "8192", "--card", "h100", "--memory_budget_gib", "24")
    kinds = ("unquantized", "fp8_backward", "fp8")
    plans = [estimate(*words, "--frozen_matmul", kind)[0]["plans"][0] for kind in kinds]
    exact, backward, rounded = (plan["seconds_per_step"] for plan in plans)
    assert 0.5 < rounded / exact < backward / exact < 0.95


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("h100",), "fp8_backward"),
        (("rtx4090",), "fp8_backward"),
        (("a100",), "unquantized"),
        (("h100", "--no_liger"), "fp8_backward"),
    ],
)
def test_frozen_matmul_auto_is_what_train_py_chooses(estimate, words, kind):
    words = ("--max_seq_length", "8192", "--memory_budget_gib", "24", "--card", *words)
    (found, printed), (expected, _) = estimate(*words), estimate(*words, "--frozen_matmul", kind)
    assert found["plans"] == expected["plans"]
    said = f"frozen_matmul: fp8_backward, as train.py chooses on {words[-1 if '--no_liger' not in words else -2]} with"
    assert (said in printed) == (kind == "fp8_backward")


def test_frozen_matmul_auto_takes_what_fits(estimate):
    """In FP8 the longest row would be shorter."""
    words = ("--card", "rtx4090", "--memory_budget_gib", "21", "--host_gib", "200", "--max_seq_length")
    longest = estimate(*words, "8192")[0]["longest_tokens"]
    assert longest == estimate(*words, "8192", "--frozen_matmul", "unquantized")[0]["longest_tokens"]
    assert longest > estimate(*words, "8192", "--frozen_matmul", "fp8_backward")[0]["longest_tokens"]
    found, printed = estimate(*words, str(longest))
    assert "fastest plan: " in printed
    assert "does NOT fit" not in printed.splitlines()[0]
    assert not found["workload"]["in_float8"]


def test_what_auto_may_mean_elsewhere_is_told_without_a_card(estimate):
    """Of a model for which another GPU would choose otherwise."""
    printed = estimate("--max_seq_length", "8192")[1]
    assert ("frozen_matmul: unquantized; an Ada, Hopper or Blackwell GPU" in printed) != torch.cuda.is_available()


def test_no_time_without_a_card(estimate):
    found, printed = estimate("--max_seq_length", "8192")
    assert "seconds_per_step" not in found["plans"][0] or torch.cuda.is_available()
    assert ("time on" in printed) == torch.cuda.is_available()
