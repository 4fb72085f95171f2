"""Raised base frequencies and skipped positions, from train.py to the programs that take its adapter."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from component.data.skipping import PositionSkipping, row_key
from component.train.argument import LongQLoRAArguments
from tests.reference.shift_short import LOOP
from tests.train_run import BASIC, GROUP, LONGEST, TRAIN_TEXTS, finish, losses, record, stock_model, token_ids
from train import training_config

CONTEXT, SEED = 192, 42
THETA = 50000.0


@pytest.fixture(scope="module")
def basic(base_folder, tmp_path_factory) -> dict:
    """Three steps, each over all four texts."""
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TRAIN_TEXTS), encoding="utf-8")
    return {**BASIC, "model_name_or_path": str(base_folder), "train_file": str(file)}


# ---- a raised base frequency

RAISED = {  # rope_type -> rope_parameters, and max_position_embeddings of adapter and merged folder
    "theta": ({"rope_type": "default"}, 64, 192),
    "linear": ({"rope_type": "linear", "factor": 3.0}, 64, 64),
    "yarn": ({"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64}, 64, 192),
}


@pytest.fixture(scope="module")
def raised(train, basic, tmp_path_factory) -> dict[str, Path]:
    """Adapter folders by rope type."""
    folder = tmp_path_factory.mktemp("raised")
    for rope_type in RAISED:
        values = {**basic, "rope_type": rope_type, "rope_theta": THETA, "output_dir": str(folder / rope_type)}
        printed = finish(train(values))
        assert "rope_theta  10000 -> 50000" in printed
        assert "warning" not in printed
    return {rope_type: folder / rope_type for rope_type in RAISED}


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


@pytest.mark.parametrize("rope_type", RAISED)
def test_the_merged_model_equals_the_adapter_in_stock_transformers(
    raised, base_folder, rope_type, run_program, tmp_path
):
    adapter, merged = raised[rope_type], tmp_path / "merged"
    parameters, in_adapter, in_merged = RAISED[rope_type]
    words = ["--adapter_name_or_path", adapter, "--save_path", merged, "--dtype", "float32"]
    done = run_program("script/merge_lora.py", *words)
    assert done.status == 0, done.err
    configs = {folder: json.loads((folder / "config.json").read_text()) for folder in (adapter, merged)}
    for folder, longest in ((adapter, in_adapter), (merged, in_merged)):
        assert configs[folder]["rope_parameters"] == {**parameters, "rope_theta": THETA}
        assert configs[folder]["max_position_embeddings"] == longest
    assert configs[merged]["rope_theta"] == THETA  # read by transformers 4
    assert configs[merged]["rope_scaling"] == (None if rope_type == "theta" else parameters)
    expected = {"rope_type": rope_type, "rope_factor": 3.0, "rope_theta": THETA, "context_tokens": CONTEXT}
    for folder in (adapter, merged):
        assert {key: record(folder)[key] for key in expected} == expected
        assert record(folder)["original_tokens"] == 64

    ids = torch.randint(2, 384, (2, CONTEXT))
    base = AutoModelForCausalLM.from_pretrained(base_folder, config=AutoConfig.from_pretrained(adapter))
    untrained = logits(base, ids)
    unmerged = logits(PeftModel.from_pretrained(base, adapter), ids)
    assert_close(logits(AutoModelForCausalLM.from_pretrained(merged), ids), unmerged, atol=1e-4, rtol=1e-4)
    assert (unmerged - untrained).abs().max() > 1e-2
    without = AutoModelForCausalLM.from_pretrained(base_folder)
    assert (logits(PeftModel.from_pretrained(without, adapter), ids) - unmerged).abs().max() > 1e-2
    assert run_program("script/merge_lora.py", *words, "--check", "only").status == 0


def test_evaluation_knows_the_context(raised, run_program, tmp_path):
    """Of an adapter whose config.json says 64 tokens; another context is refused."""
    tokens, result = tmp_path / "tokens.bin", tmp_path / "result.json"
    tokens.write_bytes(torch.randint(2, 384, (600,), dtype=torch.int16).numpy().tobytes())
    words = ["--base_model", raised["theta"], "--data_path", tokens, "--seq_len", 192, "--sliding_window", 192]
    done = run_program("script/evaluate/evaluate.py", *words, "--context_size", 192, "--output_json", result)
    assert done.status == 0, done.err
    found = json.loads(result.read_text())
    expected = {"rope_type": "default", "rope_factor": 1.0, "rope_theta": THETA, "context_tokens": CONTEXT}
    assert {key: found[key] for key in expected} == expected
    refused = run_program("script/evaluate/evaluate.py", *words, "--context_size", 400)
    assert refused.status == 1
    assert "context_size: 400 tokens need factor 3, but the context of" in refused.err


def test_a_prompt_fits_the_recorded_context(raised, run_program):
    words = ["--adapter_name_or_path", raised["theta"], "--max_new_tokens", 2, "--do_sample", "false"]
    done = run_program("script/inference/inference.py", *words, stdin=b"Groups of tokens.\n")
    assert done.status == 0, done.err
    assert "of 192 tokens of context used" in done.err + done.out


def test_passkeys_are_asked_up_to_the_recorded_context(raised, run_program, tmp_path):
    words = ["--base_model", raised["theta"], "--lengths", 180, "--depths", 1, "--trials", 1, "--output_json"]
    done = run_program("script/evaluate/passkey.py", *words, tmp_path / "passkey.json")
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "passkey.json").read_text())["context_tokens"] == CONTEXT


def test_a_merged_model_is_a_base_of_its_new_length(train, basic, raised, run_program, tmp_path):
    """Trained further with the same YAML it stays as it is, and the run says so."""
    merged = tmp_path / "merged"
    words = ["--adapter_name_or_path", raised["theta"], "--save_path", merged]
    assert run_program("script/merge_lora.py", *words).status == 0
    values = {**basic, "model_name_or_path": str(merged), "max_steps": 1}
    same = {**values, "rope_type": "theta", "rope_theta": THETA, "output_dir": str(tmp_path / "same")}
    printed = finish(train(same))
    assert "rope_theta: 50000 is the base's own, so nothing is raised" in printed
    assert (record(tmp_path / "same")["rope_type"], record(tmp_path / "same")["original_tokens"]) == ("default", 192)
    longer = {**values, "model_max_length": 384, "output_dir": str(tmp_path / "longer")}
    finish(train(longer))
    config = json.loads((tmp_path / "longer" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0, "rope_theta": THETA}
    assert config["max_position_embeddings"] == 192


# ---- skipped positions


def skipped(row: torch.Tensor, step: int) -> torch.Tensor:
    """position_ids (1, T) of a row (1, T) in a training step, counted from 0."""
    length = row.shape[1]
    cut, skip = PositionSkipping(CONTEXT, SEED).draw(row_key(row[0].tolist()), length, step)
    return torch.tensor([[*range(cut), *range(cut + skip, length + skip)]])


def expected_loss(model, rows: list[torch.Tensor], step: int, is_full: bool) -> float:
    """Of one step, token-weighted: each row alone, with its positions; full attention by an explicit causal mask."""
    total, labels = 0.0, sum(row.shape[1] - 1 for row in rows)
    for row in rows:
        tokens = row.shape[1]
        causal = torch.full((1, 1, tokens, tokens), torch.finfo(torch.float32).min).triu(1)
        with torch.no_grad():
            inputs = {"input_ids": row, "position_ids": skipped(row, step), "use_cache": False}
            found = model(**inputs, **({"attention_mask": causal} if is_full else {})).logits[0]
        total += float(F.cross_entropy(found[:-1], row[0, 1:], reduction="sum"))
    return total / labels


SKIPPING = {"position_skipping": True, "seed": SEED}
MODES = {
    "S2-Attn": {},
    "full attention": {"use_shift_short_attention": False},
    "full attention of Hugging Face's layers": {"use_shift_short_attention": False, "memory_plan": False},
    "S2-Attn, then full": {"full_attention_ratio": 0.34},
}


@pytest.mark.parametrize("mode", MODES)
def test_losses_equal_those_of_a_stock_model_with_these_positions(train, basic, base_folder, tmp_path, mode):
    """At a learning rate that changes nothing, each step is the base's loss with the step's positions."""
    values = {**basic, **SKIPPING, **MODES[mode], "learning_rate": 1e-12, "output_dir": str(tmp_path / "out")}
    printed = finish(train(values))
    assert "positions" in printed
    assert "rows of up to 150 tokens cover 192 positions: two chunks" in printed
    rows = token_ids(base_folder, TRAIN_TEXTS)
    grouped = stock_model(base_folder, group_size=GROUP, _attn_implementation=LOOP).train()
    full = stock_model(base_folder, _attn_implementation="eager").eval()
    expected = {}
    for step in (1, 2, 3):
        is_full = not values.get("use_shift_short_attention", True) or ("full_attention_ratio" in values and step == 3)
        expected[step] = expected_loss(full if is_full else grouped, rows, step - 1, is_full)
    assert losses(tmp_path / "out") == pytest.approx(expected, abs=1e-5)
    if "full_attention_ratio" not in values:
        assert min(abs(expected[a] - expected[b]) for a, b in ((1, 2), (1, 3), (2, 3))) > 1e-4


@pytest.mark.slow
def test_positions_do_not_depend_on_batches_nor_on_evaluation(train, basic, base_folder, tmp_path):
    """One row at a time, streamed or not, read by other processes: the same run. Evaluation skips nothing."""
    settings = {"one": {}, "apart": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}}
    settings["workers"] = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    settings["streamed"] = {"streaming": True}
    settings["evaluated"] = {"eval_file": basic["train_file"], "eval_strategy": "steps", "eval_steps": 1}
    for name, changes in settings.items():
        finish(train({**basic, **SKIPPING, **changes, "output_dir": str(tmp_path / name)}))
    for name in settings:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-5), name
    model = PeftModel.from_pretrained(stock_model(base_folder), tmp_path / "evaluated").eval()
    total, labels = 0.0, 0
    for row in token_ids(base_folder, TRAIN_TEXTS):
        total += float(F.cross_entropy(logits(model, row)[0, :-1], row[0, 1:], reduction="sum"))
        labels += row.shape[1] - 1
    measured = json.loads((tmp_path / "evaluated" / "eval_results.json").read_text())["eval_loss"]
    assert measured == pytest.approx(total / labels, abs=1e-5)


def test_a_resumed_run_has_the_same_positions(train, basic, tmp_path):
    values = {**basic, **SKIPPING, "lora_dropout": 0.1, "per_device_train_batch_size": 1, "max_steps": 6}
    finish(train({**values, "output_dir": str(tmp_path / "unbroken")}))
    broken = {**values, "output_dir": str(tmp_path / "broken"), "resume_from_checkpoint": "auto"}
    finish(train({**broken, "max_steps": 3}))
    finish(train(broken))
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "unbroken"), abs=1e-6)
    assert record(tmp_path / "broken")["arguments"]["position_skipping"] is True


@pytest.mark.slow  # fast: tests/component/data/test_skipping.py
def test_another_seed_has_other_positions(train, basic, tmp_path):
    values = {**basic, **SKIPPING, "learning_rate": 1e-12, "max_steps": 1}
    found = []
    for name, seeds in {"one": {}, "data": {"data_seed": 7}, "both": {"data_seed": SEED, "seed": 9}}.items():
        finish(train({**values, **seeds, "output_dir": str(tmp_path / name)}))
        found.append(losses(tmp_path / name)[1])
    assert abs(found[0] - found[1]) > 1e-4
    assert found[0] == pytest.approx(found[2], abs=1e-6)


def test_a_skip_is_no_border_of_a_document(basic, base_folder):
    """transformers takes it for one where it gets no mask, so such runs never use its own attention."""
    stock = stock_model(base_folder).eval()
    row = token_ids(base_folder, TRAIN_TEXTS)[3]
    positions, causal = skipped(row, 0), torch.full((1, 1, LONGEST, LONGEST), torch.finfo(torch.float32).min).triu(1)
    with torch.no_grad():
        split = stock(row, position_ids=positions, use_cache=False).logits
        whole = stock(row, position_ids=positions, attention_mask=causal, use_cache=False).logits
    assert (split - whole).abs().max() > 0.1
    values = basic | {"use_shift_short_attention": False, "memory_plan": False}
    for asked in (True, False):
        ours = {key: value for key, value in values.items() if key in LongQLoRAArguments.__dataclass_fields__}
        arguments = LongQLoRAArguments(**ours, position_skipping=asked)
        assert training_config(arguments, stock.config)._attn_implementation == ("shift_short" if asked else "sdpa")


# ---- what is refused, before any weight is loaded

REFUSED = {
    "theta without a number": (
        {"rope_type": "theta"},
        "rope_type: theta needs rope_theta, above the base's own 10000",
    ),
    "a smaller theta": ({"rope_theta": 5000}, "rope_theta: 5000 is less than the base's own 10000"),
    "theta 0": ({"rope_theta": 0}, "rope_theta: 0.0; use a number above the model's own"),
    "theta in words": ({"rope_theta": "large"}, "rope_theta: 'large'"),
    "nothing to skip": (
        {"position_skipping": True, "max_seq_length": 192},
        "position_skipping: true, but rows of 192",
    ),
    "packed": ({"position_skipping": True, "packing": True}, "set one of them to false"),
    "dynamic": ({"position_skipping": True, "rope_type": "dynamic"}, "position_skipping: true, but dynamic positions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(train, basic, tmp_path, case):
    changes, message = REFUSED[case]
    done = train({**basic, **changes, "output_dir": str(tmp_path / "out")})
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert "Loading weights" not in done.stdout
