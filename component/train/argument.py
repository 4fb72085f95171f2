"""What may a user set, and is it sane?

A run is described by one flat YAML file: the keys of `LongQLoRAArguments` below and every key of
`transformers.TrainingArguments`; `--key value` on the command line overrides one. Everything that is wrong is
collected and reported in one message, before any weight is loaded.
"""

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import PretrainedConfig, TrainingArguments

from component.error import UserError, nearest
from component.memory.plan import MEMORY_OPTIONS
from component.train.validation import validate
from component.train.yaml_file import _read_yaml, parse_value

DEFAULT_FILE = "./train_args/llama2-7b-pretrain.yaml"


def _key(help: str, default: typing.Any = dataclasses.MISSING):
    return field(default=default, metadata={"help": help})


@dataclass
class LongQLoRAArguments:
    """The keys of this project. `field(default=MISSING)` marks a key that every YAML must set."""

    model_name_or_path: str = _key("base model: a folder or a Hugging Face hub id")
    train_file: str = _key(
        "training data: a file (.jsonl, .parquet, .txt, .bin), a folder, or owner/dataset/file.jsonl on the hub"
    )
    sft: bool = _key(
        'true: {"input", "output"} or {"messages"} lines, loss on answers; false: {"text"} lines, loss on all of it'
    )
    max_seq_length: int = _key("tokens per training sample")
    model_max_length: int = _key("context in tokens that positions are stretched to; at least max_seq_length")
    eval_file: str | None = _key("data like train_file, for loss and perplexity with full attention", None)
    truncation_policy: str = _key("longer samples: truncate (cut), split (cut into several) or drop", "truncate")
    packing: bool = _key("fill rows with whole samples; attention stays inside each", False)
    streaming: bool = _key("make samples while training, keep none on disk; needs max_steps", False)
    max_bad_fraction: float = _key("share of lines that may be unusable; more are refused", 0.01)
    template: str = _key("spelling of chats: vicuna, or tokenizer (the model's own chat template)", "vicuna")
    rope_type: str | None = _key(
        "how positions are stretched: linear, dynamic or yarn; empty: as the model's are already, else linear", None
    )
    use_shift_short_attention: bool = _key("S2-Attn while training; false trains with full attention", True)
    group_size_ratio: float = _key("tokens per attention group, as a share of max_seq_length", 0.25)
    group_size: int | None = _key("tokens per attention group, even; overrides group_size_ratio", None)
    full_attention_ratio: float = _key("share of the steps, the last ones, with full attention, not S2-Attn", 0.0)
    use_flash_attn: bool | None = _key(
        "true: flash kernels or an error; false: never flash (what a V100 has); empty: the fastest that runs", None
    )
    load_in_4bit: bool = _key("NF4 with double quantisation for the frozen base; false keeps it in 16 bits", True)
    target_modules: str | list[str] | None = _key(
        "linear layers that get LoRA: names with commas between, or a list; empty: all but lm_head", None
    )
    lora_rank: int = _key("rank of the LoRA matrices", 64)
    lora_alpha: float = _key("LoRA's output is scaled by lora_alpha / lora_rank", 16)
    lora_dropout: float = _key("dropout in front of LoRA", 0.05)
    train_embedding: bool = _key("train the token embedding and lm_head too", False)
    train_norm: bool = _key("train the normalisation weights too", False)
    memory_plan: bool = _key("train by the fastest memory plan that fits; false: Hugging Face's own layers", True)
    memory_budget_gib: float | None = _key("GPU memory in GiB that this run may take; empty: the whole card", None)
    keep_layers: int | None = _key("decoder layers that are not computed again; empty: the plan decides", None)
    keep_attention_layers: int | None = _key("further layers whose MLP alone is computed again; empty: the plan", None)
    keep_attention_output: bool | None = _key("recomputed layers run attention's kernel once; empty: the plan", None)
    offload_activations: bool | None = _key("inputs of recomputed layers wait in host memory; empty: the plan", None)
    mlp_tile_tokens: int | None = _key("tokens per tile of an MLP, 0 for no tiles; empty: the plan decides", None)
    use_liger_kernel: bool | None = _key(
        "Liger's norms, rope and SwiGLU; empty: where they run (Ampere or newer)", None
    )
    loss_chunk_tokens: int | None = _key("tokens whose logits exist at a time; empty: the plan decides", None)
    overwrite_output_dir: bool = _key("start afresh in an output_dir that already holds a run", False)

    @property
    def data(self) -> dict[str, typing.Any]:
        """What data becomes, by the names of `component.data.dataset.SampleOptions`."""
        names = ("max_seq_length", "sft", "truncation_policy", "template", "max_bad_fraction")
        return {name: getattr(self, name) for name in names}

    @property
    def group_tokens(self) -> int | None:
        """Tokens per attention group: `group_size`, or the ratio's share of `max_seq_length`, made even.

        None without S2-Attn.
        """
        if not self.use_shift_short_attention:
            return None
        return self.group_size or max(2, int(self.group_size_ratio * self.max_seq_length) // 2 * 2)

    def record(self, extended: PretrainedConfig, factor: float) -> dict[str, typing.Any]:
        """What `longqlora.json` says of a run with these arguments, on a model stretched to `extended` by `factor`."""
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
        """The parts of a memory plan that are set by hand, the others None."""
        return {name: getattr(self, name) for name in MEMORY_OPTIONS}

    @property
    def target_names(self) -> list[str] | None:
        if self.target_modules is None:
            return None
        names = self.target_modules.split(",") if isinstance(self.target_modules, str) else self.target_modules
        return [name.strip() for name in names if name.strip()]


def parse_arguments(argv: list[str]) -> tuple[LongQLoRAArguments, TrainingArguments]:
    """Command line and YAML file -> checked arguments.

    Raises:
        UserError: one message with every problem found.
    """
    file, overrides = _parse_command_line(argv)
    values = {**_read_yaml(file), **overrides}
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
        raise UserError(f"{file} cannot be trained with:\n" + "\n".join(f"  - {problem}" for problem in problems))
    args = LongQLoRAArguments(**{key: value for key, value in typed.items() if key in ours})
    return args, _training_arguments(file, {key: value for key, value in typed.items() if key not in ours})


def _training_arguments(file: str, values: dict) -> TrainingArguments:
    # ours, because a run's record counts tokens; and the recomputation that needs no gradient at the embedding
    values = {"include_num_input_tokens_seen": "non_padding", "ddp_find_unused_parameters": False, **values}
    # transformers 5.23 has another name for it, and warns of the one that the original's YAMLs have
    is_renamed = hasattr(TrainingArguments, "activation_checkpointing_kwargs")
    name = "activation_checkpointing" if is_renamed else "gradient_checkpointing"
    values = {key.replace("gradient_checkpointing", name): value for key, value in values.items()}
    values.setdefault(f"{name}_kwargs", {"use_reentrant": False})
    # each process takes its share of a stream itself: the first one can only deal out batches of equal lengths
    values.setdefault("accelerator_config", {"dispatch_batches": False})
    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{file}: {error}") from error
    if arguments.deepspeed and arguments.hf_deepspeed_config.mismatches:  # what the Trainer says after loading
        contradictions = "\n  ".join(arguments.hf_deepspeed_config.mismatches)
        raise UserError(f'deepspeed: contradicts {file}; write "auto" in the DeepSpeed file for\n  {contradictions}')
    return arguments


def _parse_command_line(argv: list[str]) -> tuple[str, dict]:
    keys = "\n".join(f"  {item.name:26}{item.metadata['help']}" for item in dataclasses.fields(LongQLoRAArguments))
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Extend the context of a Llama-family model with LongQLoRA.",
        epilog=f"keys of the YAML file; any of them, and any key of transformers.TrainingArguments, can be\n"
        f"overridden as --key value:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train_args_file", default=DEFAULT_FILE, help=f"YAML file (default {DEFAULT_FILE})")
    parser.add_argument("--local_rank", type=int, help="set by the deepspeed launcher")
    known, rest = parser.parse_known_args(argv)
    overrides = {}
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r}: an override is spelt --key value, as in --learning_rate 1e-4")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{key}: no value; an override is spelt --key value")
            value = rest.pop(0)
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--{key}: {value!r} is no YAML value; put quotes around it, as in '\"a: b\"'") from error
    return known.train_args_file, overrides


def _hints(cls: type) -> dict[str, typing.Any]:
    # `resume_from_checkpoint: true` is documented, but not in its type
    hints = {**typing.get_type_hints(cls), "resume_from_checkpoint": str | bool | None}
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init}
