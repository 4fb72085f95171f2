"""What may a user set, and is it valid?

A run is described by one flat YAML file with the keys of `LongQLoRAArguments` below and of
`transformers.TrainingArguments`; `--key value` on the command line overrides one. All problems are reported in one
message, before any weight is loaded.
"""

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import PretrainedConfig, TrainingArguments

from component.error import UserError, nearest
from component.memory.plan import MEMORY_OPTIONS
from component.train.validation import validate
from component.train.yaml_file import parse_value, parse_yaml, read_yaml

DEFAULT_FILE = "./train_args/llama2-7b-pretrain.yaml"


def _key(help: str, default: typing.Any = dataclasses.MISSING):
    return field(default=default, metadata={"help": help})


@dataclass
class LongQLoRAArguments:
    """The YAML keys of this project; those without a default are required."""

    model_name_or_path: str = _key("base model: a folder or a Hugging Face hub id")
    train_file: str = _key(
        "training data: a file (.jsonl, .parquet, .txt, .bin), a folder, or owner/dataset/file.jsonl on the hub"
    )
    sft: bool = _key(
        'true: {"input", "output"} or {"messages"} lines, loss on answers; false: {"text"} lines, loss on all tokens'
    )
    max_seq_length: int = _key("tokens per training sample")
    model_max_length: int = _key("target context in tokens, to which positions are scaled; at least max_seq_length")
    eval_file: str | None = _key("data like train_file; loss and perplexity with full attention", None)
    truncation_policy: str = _key("samples beyond max_seq_length: truncate, split (into several) or drop", "truncate")
    packing: bool = _key("fill rows with several samples, which do not attend to each other", False)
    streaming: bool = _key("tokenize during training and cache nothing on disk; needs max_steps", False)
    max_bad_fraction: float = _key("share of records that may be unusable and skipped; more is an error", 0.01)
    template: str = _key("chat template: vicuna, or tokenizer (the model's own)", "vicuna")
    rope_type: str | None = _key(
        "position scaling: linear, dynamic or yarn; empty: the type the model already has, else linear", None
    )
    use_shift_short_attention: bool = _key("S2-Attn in training; false: full attention", True)
    group_size_ratio: float = _key("tokens per attention group, as a share of max_seq_length", 0.25)
    group_size: int | None = _key("tokens per attention group, even; overrides group_size_ratio", None)
    full_attention_ratio: float = _key("share of the steps, at the end, with full attention instead of S2-Attn", 0.0)
    use_flash_attn: bool | None = _key(
        "true: flash kernels or an error; false: never flash; empty: the fastest available kernel", None
    )
    load_in_4bit: bool = _key("frozen base in NF4 with double quantization; false: in the training precision", True)
    target_modules: str | list[str] | None = _key(
        "linear layers that get LoRA: comma-separated names or a list; empty: all but lm_head", None
    )
    lora_rank: int = _key("rank of the LoRA matrices", 64)
    lora_alpha: float = _key("LoRA's output is scaled by lora_alpha / lora_rank", 16)
    lora_dropout: float = _key("dropout on LoRA's input", 0.05)
    train_embedding: bool = _key("train the token embedding and lm_head in full", False)
    train_norm: bool = _key("train the normalization weights in full", False)
    memory_plan: bool = _key("use the fastest memory plan that fits; false: Hugging Face's own layers and loss", True)
    memory_budget_gib: float | None = _key("GPU memory in GiB that this run may use; empty: all of it", None)
    keep_layers: int | None = _key("decoder layers without activation checkpointing; empty: by plan", None)
    keep_attention_layers: int | None = _key("further layers that recompute only the MLP; empty: by plan", None)
    keep_attention_output: bool | None = _key("recomputed layers keep attention's output; empty: by plan", None)
    offload_activations: bool | None = _key("offload what recomputed layers save to CPU memory; empty: by plan", None)
    mlp_tile_tokens: int | None = _key("tokens per MLP tile, 0: no tiling; empty: by plan", None)
    use_liger_kernel: bool | None = _key("Liger's norms, rope and SwiGLU; empty: if available (Ampere+)", None)
    loss_chunk_tokens: int | None = _key("tokens whose logits exist at the same time; empty: by plan", None)
    overwrite_output_dir: bool = _key("start from scratch in an output_dir that already holds a run", False)

    @property
    def data(self) -> dict[str, typing.Any]:
        """The fields of `component.data.dataset.SampleOptions`."""
        names = ("max_seq_length", "sft", "truncation_policy", "template", "max_bad_fraction")
        return {name: getattr(self, name) for name in names}

    @property
    def group_tokens(self) -> int | None:
        """Group size in tokens: `group_size`, or the ratio's share of `max_seq_length` made even; None without S2."""
        if not self.use_shift_short_attention:
            return None
        return self.group_size or max(2, int(self.group_size_ratio * self.max_seq_length) // 2 * 2)

    def record(self, extended: PretrainedConfig, factor: float) -> dict[str, typing.Any]:
        """The part of `longqlora.json` that is known before training; `extended` is the config scaled by `factor`."""
        base = Path(self.model_name_or_path)
        return {
            "base_model": str(base.resolve()) if base.is_dir() else self.model_name_or_path,
            "context_tokens": self.model_max_length,
            "max_seq_length": self.max_seq_length,
            "rope_type": extended.rope_parameters.get("rope_type", "default"),
            "rope_factor": factor,
            "template": self.template if self.sft else None,
            "group_size": self.group_tokens,
            "arguments": dataclasses.asdict(self),
        }

    @property
    def memory_options(self) -> dict[str, typing.Any]:
        """The memory options set by the user; the others are None."""
        return {name: getattr(self, name) for name in MEMORY_OPTIONS}

    @property
    def target_names(self) -> list[str] | None:
        if self.target_modules is None:
            return None
        names = self.target_modules.split(",") if isinstance(self.target_modules, str) else self.target_modules
        return [name.strip() for name in names if name.strip()]


def parse_arguments(argv: list[str]) -> tuple[LongQLoRAArguments, TrainingArguments]:
    """Command line and YAML file -> validated arguments.

    Raises:
        UserError: one message with all problems.
    """
    file, overrides = _parse_command_line(argv)
    values = {**read_yaml(file), **overrides}
    ours, theirs = _hints(LongQLoRAArguments), _hints(TrainingArguments)
    known = theirs | ours
    problems: list[str] = []
    typed: dict[str, typing.Any] = {}
    for key, value in values.items():
        try:
            typed[key] = parse_value(value, known[key])
        except KeyError:
            problems.append(f"{key}: unknown key{nearest(str(key), known)}")
        except ValueError as error:
            problems.append(f"{key}: {error}")
    for item in dataclasses.fields(LongQLoRAArguments):
        if item.default is dataclasses.MISSING and item.name not in values:
            problems.append(f"{item.name}: missing; {item.metadata['help']}")
    problems += validate(typed)
    if problems:
        raise UserError(f"{file} has problems:\n" + "\n".join(f"  - {problem}" for problem in problems))
    args = LongQLoRAArguments(**{key: value for key, value in typed.items() if key in ours})
    return args, _training_arguments(file, {key: value for key, value in typed.items() if key not in ours})


def _training_arguments(file: str, values: dict) -> TrainingArguments:
    # the record counts trained tokens; with frozen weights, DDP has no unused parameters to search for
    values = {"include_num_input_tokens_seen": "non_padding", "ddp_find_unused_parameters": False, **values}
    # transformers' default of 8 rows would take eight times the memory that training rows were planned for
    values.setdefault("per_device_eval_batch_size", 1)
    if not torch.cuda.is_available():
        values.setdefault("use_cpu", True)  # else DeepSpeed's processes don't find each other
    # renamed in transformers 5.23, which warns about the old name; the original project's YAMLs use it
    is_renamed = hasattr(TrainingArguments, "activation_checkpointing_kwargs")
    name = "activation_checkpointing" if is_renamed else "gradient_checkpointing"
    values = {key.replace("gradient_checkpointing", name): value for key, value in values.items()}
    values.setdefault(f"{name}_kwargs", {"use_reentrant": False})  # needs no gradient at the embedding
    # each process reads its own share of a stream; dispatching from one process needs batches of equal length
    values.setdefault("accelerator_config", {"dispatch_batches": False})
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{file}: {error}") from error
    if arguments.deepspeed and arguments.hf_deepspeed_config.mismatches:  # else the Trainer raises after loading
        contradictions = "\n  ".join(arguments.hf_deepspeed_config.mismatches)
        raise UserError(f'deepspeed: contradicts {file}; write "auto" in the DeepSpeed file for\n  {contradictions}')
    return arguments


def _parse_command_line(argv: list[str]) -> tuple[str, dict]:
    keys = "\n".join(f"  {item.name:26}{item.metadata['help']}" for item in dataclasses.fields(LongQLoRAArguments))
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Extend the context of a Llama-family model with LongQLoRA.",
        epilog=f"YAML keys besides those of transformers.TrainingArguments; override any as --key value:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train_args_file", default=DEFAULT_FILE, help=f"YAML file (default {DEFAULT_FILE})")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    known, rest = parser.parse_known_args(argv)
    overrides = {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: write overrides as --key value, e.g. --learning_rate 1e-4")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key}: no value; write --key value")
            value = rest.pop(0)
        try:
            overrides[key] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{key}: {value!r} is not a YAML value; quote it, e.g. '\"a: b\"'") from error
    return known.train_args_file, overrides


def _hints(cls: type) -> dict[str, typing.Any]:
    # transformers documents `resume_from_checkpoint: true`, but its type hint lacks bool
    hints = {**typing.get_type_hints(cls), "resume_from_checkpoint": str | bool | None}
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init}
