"""YAML and command line -> validated arguments: parsed values, defaults, overrides.

Invalid values and their messages are in tests/end_to_end/test_wrong_inputs.py.
"""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from component.attention.interface import use_shift_short_attention
from component.distributed.strategy import training_strategy
from component.error import UserError
from component.memory.plan import estimate, minimum_memory_plan
from component.memory.workload import workload
from component.rope import context_length, extend_context, original_context, own_rope_type
from component.train.argument import REMOVED
from component.train.settings import parse_arguments
from script.shared.random_model import config_of
from script.shared.shape import SHAPES
from tests.conftest import ROOT

MINIMAL = {
    "output_dir": "out",
    "model_name_or_path": "some/model",
    "train_file": "data.jsonl",
    "sft": False,
    "max_seq_length": 8192,
    "model_max_length": 8192,
}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def parse(tmp_path):
    """parse(lines, *words): the arguments of a minimal YAML followed by `lines`, with `words` on the command line."""

    def run(lines: str = "", *words: str, **changes):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(MINIMAL | changes) + lines + "\n")
        return parse_arguments(["--train_args_file", str(file), *words])

    return run


def test_defaults_are_the_papers(parse):
    args, training_args = parse()
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout) == (64, 16, 0.05)
    assert (args.rope_type, args.group_size_ratio, args.group_tokens) == (None, 0.25, 2048)
    assert args.use_shift_short_attention
    assert args.load_in_4bit
    assert not args.train_embedding
    assert not args.train_norm
    assert args.target_names is None, "every linear layer"
    assert args.eval_file is None
    assert training_args.output_dir == "out"


DESIGN_KEYS = {
    "sft": True,
    "train_file": "a.jsonl",
    "eval_file": "b.jsonl",
    "model_name_or_path": "m",
    "max_seq_length": 1024,
    "model_max_length": 2048,
    "target_modules": "q_proj,v_proj",
    "use_flash_attn": False,
    "train_embedding": True,
    "train_norm": True,
    "lora_rank": 8,
    "lora_alpha": 32,
    "lora_dropout": 0.1,
}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frozen_matmul: off", "frozen_matmul: False is not text; use one of auto, unquantized, fp8_backward, fp8"),
        ("group_size: x", "group_size: 'x' is not a whole number or empty; use an even number of tokens >= 2"),
        ("target_modules: 3", "target_modules: 3 is not text or list"),
    ],
)
def test_a_value_of_another_type_is_told_what_may_be_there(line, message, parse):
    with pytest.raises(UserError) as raised:
        parse(line)
    assert f"  - {message}" in str(raised.value)


@pytest.mark.parametrize("key", DESIGN_KEYS)
def test_each_documented_key_arrives(key, parse):
    args, _ = parse(**{"max_seq_length": 1024, key: DESIGN_KEYS[key]})
    assert getattr(args, key) == DESIGN_KEYS[key]


# keys whose values are Python objects
NOT_FOR_YAML = {"parallelism_config"}
NOT_BY_DEFAULT = {"output_dir", "do_train", *NOT_FOR_YAML}
RECOMPUTED = {
    *("logging_steps", "report_to", "disable_tqdm", "dataloader_pin_memory", "debug"),
    "include_num_input_tokens_seen",
}
TRAINING_KEYS = [item.name for item in dataclasses.fields(TrainingArguments) if item.init]


def test_each_key_of_training_arguments_is_known(parse):
    """Each is set to its default, which is also the value in effect for all but a few."""
    values = {}
    for item in dataclasses.fields(TrainingArguments):
        if item.init and item.default is not dataclasses.MISSING and item.name not in NOT_BY_DEFAULT:
            values[item.name] = getattr(item.default, "value", item.default)
    assert len(values) > 90
    assert {"deepspeed", "optim", "warmup_steps", "gradient_checkpointing", "report_to"} <= set(values)
    _, training_args = parse(**values)
    for key, value in values.items():
        kept = getattr(training_args, key)
        if key not in RECOMPUTED:
            assert getattr(kept, "value", kept) == value or value is None, key


def test_smaller_is_better_for_every_metric(parse):
    """transformers takes the largest perplexity for the best."""
    best = {"eval_file": "e.jsonl", "eval_strategy": "steps", "load_best_model_at_end": True}
    _, training_args = parse(metric_for_best_model="perplexity", **best)
    assert training_args.greater_is_better is False


def test_batches_are_not_dispatched_unless_asked(parse):
    config = parse(accelerator_config={"even_batches": False})[1].accelerator_config
    assert (config.even_batches, config.dispatch_batches) == (False, False)
    assert parse(accelerator_config={"dispatch_batches": True})[1].accelerator_config.dispatch_batches is True


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("learning_rate: 2e-4", "learning_rate", 2e-4),  # a string to YAML 1.1
        ("learning_rate: '0.0002'", "learning_rate", 2e-4),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 1000.0", "max_steps", 1000),
        ("max_steps: 1_000", "max_steps", 1000),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("save_strategy: no", "save_strategy", SaveStrategy.NO),  # false to YAML 1.1
        ("eval_strategy: no", "eval_strategy", IntervalStrategy.NO),
        ("save_strategy: epoch", "save_strategy", SaveStrategy.EPOCH),
        ("lr_scheduler_type: constant_with_warmup", "lr_scheduler_type", SchedulerType.CONSTANT_WITH_WARMUP),
        ("optim: paged_adamw_32bit", "optim", OptimizerNames.PAGED_ADAMW),
        ("gradient_checkpointing: yes", "gradient_checkpointing", True),
        ("bf16: on\nuse_cpu: true", "bf16", True),
        ("run_name: '12'", "run_name", "12"),
        ("resume_from_checkpoint: auto", "resume_from_checkpoint", "auto"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", True),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("warmup_steps: 0.03", "warmup_steps", 0.03),  # a share of all steps
    ],
)
def test_parsed_values_of_training_arguments(line, key, value, parse):
    kept = getattr(parse(line)[1], key)
    assert kept == value
    assert type(kept) is type(value)


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("lora_alpha: 16", "lora_alpha", 16.0),
        ("lora_dropout: 5e-2", "lora_dropout", 0.05),
        ("lora_rank: '32'", "lora_rank", 32),
        ("group_size: 512", "group_size", 512),
        ("use_flash_attn:", "use_flash_attn", None),
        ("target_modules: [q_proj, v_proj]", "target_modules", ["q_proj", "v_proj"]),
        ("eval_file: ~", "eval_file", None),
    ],
)
def test_parsed_values_of_our_keys(line, key, value, parse):
    kept = getattr(parse(line)[0], key)
    assert kept == value
    assert type(kept) is type(value)


@pytest.mark.parametrize("text", ["q_proj,v_proj", "q_proj, v_proj ,", ["q_proj", "v_proj"]])
def test_target_names(text, parse):
    assert parse(target_modules=text)[0].target_names == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 2048),
        ({"max_seq_length": 4096}, 1024),
        ({"group_size_ratio": 0.5}, 4096),
        ({"group_size": 1000}, 1000),
        ({"group_size": 1000, "group_size_ratio": 0.5}, 1000),
        ({"max_seq_length": 1002}, 250),  # 250.5
        ({"max_seq_length": 1004}, 250),  # 251 is odd, and groups are shifted by half
        ({"max_seq_length": 6}, 2),
        ({"group_size_ratio": 1}, 8192),
        ({"use_shift_short_attention": False, "group_size": 1000}, None),
    ],
)
def test_group_tokens(changes, tokens, parse):
    assert parse(**changes)[0].group_tokens == tokens


class TestOverrides:
    def test_override_the_file(self, parse):
        args, training_args = parse("learning_rate: 1e-3", "--learning_rate", "5e-5", "--lora_rank", "8")
        assert (training_args.learning_rate, args.lora_rank) == (5e-5, 8)

    def test_equals_sign(self, parse):
        assert parse("", "--lora_rank=8")[0].lora_rank == 8

    def test_before_the_file(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(MINIMAL))
        args, _ = parse_arguments(["--lora_rank", "8", "--train_args_file", str(file)])
        assert args.lora_rank == 8

    def test_supply_missing_keys(self, tmp_path):
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({key: MINIMAL[key] for key in MINIMAL if key != "train_file"}))
        args, _ = parse_arguments(["--train_args_file", str(file), "--train_file", "other.jsonl"])
        assert args.train_file == "other.jsonl"

    @pytest.mark.parametrize(
        ("words", "key", "value"),
        [
            (["--max_steps", "-1"], "max_steps", -1),  # a value, not a flag
            (["--use_cpu", "true"], "use_cpu", True),
            (["--gradient_checkpointing", "false"], "gradient_checkpointing", False),
            (["--run_name", "two words"], "run_name", "two words"),
            (["--report_to", "none"], "report_to", []),
            (["--save_strategy", "no"], "save_strategy", SaveStrategy.NO),
        ],
    )
    def test_values(self, words, key, value, parse):
        assert getattr(parse("", *words)[1], key) == value

    def test_unset_a_value(self, parse):
        assert parse("eval_file: b.jsonl", "--eval_file=")[0].eval_file is None

    def test_the_launchers_flag_is_ignored(self, parse):
        parse("", "--local_rank=0")
        parse("", "--local_rank", "0")

    def test_without_a_value(self, parse):
        with pytest.raises(UserError, match="--sft"):
            parse("", "--sft")


SHIPPED = {
    "llama2-7b-pretrain.yaml": {
        "model_name_or_path": "NousResearch/Llama-2-7b-hf",
        "sft": False,
        "max_steps": 1000,
        "learning_rate": 2e-4,
        "output_dir": "./output/LongQLoRA-Llama2-7b-8k",
    },
    "vicuna-13b-sft.yaml": {
        "model_name_or_path": "lmsys/vicuna-13b-v1.5",
        "sft": True,
        "max_steps": -1,
        "learning_rate": 1e-4,
        "output_dir": "./output/LongQLoRA-Vicuna-13b-8k",
    },
}
# in both files of the original project, github.com/yangjianxin1/LongQLoRA, train_args/
ORIGINAL = {
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_seq_length": 8192,
    "model_max_length": 8192,
    "logging_steps": 50,
    "save_steps": 100,
    "save_total_limit": 3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 20,
    "lora_rank": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "gradient_checkpointing": True,
    "disable_tqdm": False,
    "optim": "paged_adamw_32bit",
    "seed": 42,
    "report_to": ["tensorboard"],
    "dataloader_num_workers": 0,
    "save_strategy": "steps",
    "weight_decay": 0.0,
    "max_grad_norm": 0.3,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_yaml_holds_the_originals_values(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = f"train_args/{name}"
    # fp16 asks for a GPU, and the DeepSpeed file would start DeepSpeed
    args, training_args = parse_arguments(["--train_args_file", file, "--fp16", "false", "--deepspeed="])
    for key, value in (ORIGINAL | SHIPPED[name]).items():
        kept = getattr(args, key) if hasattr(args, key) else getattr(training_args, key)
        assert getattr(kept, "value", kept) == value, key
    raw = yaml.safe_load(Path(file).read_text())
    assert raw["fp16"] is True
    assert raw["deepspeed"] == "./train_args/deepspeed/deepspeed_config_s2.json"


FAMILIES = {  # YAML: shape, context before -> after, minimum budget in GiB, group
    "llama2-7b-16gb": ("7b", 4096, 16384, 12.5),
    "llama2-7b-24gb": ("7b", 4096, 32768, 21),
    "llama2-7b-32k": ("7b", 4096, 32768, 29),
    "llama2-7b-32k-sft": ("7b", 32768, 32768, 29),  # of the merged llama2-7b-32k
    "llama2-7b-128k": ("7b", 4096, 131072, 29),
    "llama2-13b-32k": ("13b", 4096, 32768, 29),
    "llama3-8b-128k": ("llama3-8b", 8192, 131072, 29),
    "llama3.1-8b-256k": ("llama3.1-8b", 131072, 262144, 29),
    "qwen2.5-7b-32k": ("qwen2.5-7b", 32768, 32768, 29),
    "mistral-7b-64k": ("mistral-7b", 32768, 65536, 29),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_shipped_yaml_extends_its_family_within_its_card(name, monkeypatch):
    """On the published config: the context that its first line tells, and a memory plan that fits."""
    monkeypatch.chdir(ROOT)
    size, before, after, budget = FAMILIES[name]
    file = f"train_args/{name}.yaml"
    raw = yaml.safe_load(Path(file).read_text())
    words = ["--fp16", "false", "--bf16", "false", "--deepspeed=", "--memory_budget_gib", "null"]
    args, _ = parse_arguments(["--train_args_file", file, *words])
    assert raw.get("memory_budget_gib", budget) == budget
    config = config_of(replace(SHAPES[size], context=before))  # Qwen2.5's chat model tells less than its base
    assert original_context(config) == (8192 if size == "llama3.1-8b" else before)
    extend_context(config, args.model_max_length, args.rope_type or own_rope_type(config))
    assert context_length(config) == after
    use_shift_short_attention(config, args.group_tokens, args.max_seq_length)
    strategy = training_strategy(raw["deepspeed"], 1, 1)
    work = workload(
        config,
        target_names=args.target_names,
        rank=args.lora_rank,
        tokens=args.max_seq_length,
        group=args.group_tokens,
        fused=budget > 16,
        offload_optimizer=strategy.offloads_optimizer,
        full_steps=True,
    )
    plan = replace(minimum_memory_plan(), loss_chunk_tokens=1024)
    assert estimate(work, plan).peak_gib < 0.98 * budget
    assert estimate(work, plan).host_gib < 64


def test_every_shipped_yaml_is_tested():
    files = {file.stem for file in (ROOT / "train_args").glob("*.yaml")}
    assert files == FAMILIES.keys() | {name.removesuffix(".yaml") for name in SHIPPED} | {"demo"}


def test_the_originals_own_yaml_is_accepted(tmp_path, parse):
    """Its keys, all of them; `remove_unused_columns: false` too."""
    lines = "\n".join(
        f"{key}: {value if value is not True and value is not False else str(value).lower()}"
        for key, value in {**ORIGINAL, "remove_unused_columns": False, "report_to": "tensorboard"}.items()
        if key not in MINIMAL
    )
    _, training_args = parse(lines)
    assert training_args.remove_unused_columns is False


def test_a_yaml_of_the_originals_keys_is_read_without_a_warning(parse, recwarn):
    args = parse("gradient_checkpointing: true")[1]
    assert args.gradient_checkpointing
    parse("gradient_checkpointing: false")
    assert not [str(warning.message) for warning in recwarn if "checkpointing" in str(warning.message)]


def test_checkpointing_recomputes_without_a_gradient_at_the_embedding(parse):
    assert parse("gradient_checkpointing: true")[1].gradient_checkpointing_kwargs == {"use_reentrant": False}


REMOVED_KEYS = {
    "warmup_ratio: 0.03": "warmup_ratio: transformers 5 removed it; write warmup_steps: a number below 1 is a share",
    "logging_dir: logs": "logging_dir: .* set the environment variable TENSORBOARD_LOGGING_DIR",
    "group_by_length: true": "group_by_length: .* write train_sampling_strategy: group_by_length",
    "save_safetensors: true": "save_safetensors: .* leave it out",
    "no_cuda: true": "no_cuda: .* write use_cpu",
    "evaluation_strategy: steps": "evaluation_strategy: .* write eval_strategy",
}


@pytest.mark.parametrize("line", REMOVED_KEYS)
def test_k13_a_key_that_transformers_5_removed_says_what_to_write(line, parse):
    with pytest.raises(UserError, match=REMOVED_KEYS[line]):
        parse(line)


def test_k13_no_removed_key_is_one_of_transformers_today():
    today = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert not REMOVED.keys() & today
    for key, cure in REMOVED.items():
        for word in (word.strip(",:;") for word in cure.partition("write ")[2].split()[:1]):
            assert word == "it" or word in today, key
