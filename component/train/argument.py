"""What may a user set, and where?

A run is described by one flat YAML file with the keys of `LongQLoRAArguments` below and of
`transformers.TrainingArguments`; `--key value` on the command line overrides one. Nothing here imports torch, so that
--help and a missing file answer at once; component/train/settings.py checks the values.
"""

import argparse
import ast
import dataclasses
import importlib.util
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from component.cli import QUIET
from component.error import UserError, nearest
from component.train.yaml_file import parse_yaml, read_yaml

if typing.TYPE_CHECKING:
    from transformers import PretrainedConfig

DEFAULT_FILE = "./train_args/llama2-7b-pretrain.yaml"


def _key(help: str, default: typing.Any = dataclasses.MISSING):
    return field(default=default, metadata={"help": help})


FLOAT8 = ("fp8_backward", "fp8")  # values of frozen_matmul
MATMULS = ("auto", "unquantized", *FLOAT8)


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
        "position scaling: linear, dynamic, yarn, or theta (none, with rope_theta raised); "
        "empty: the type the model already has, else linear",
        None,
    )
    rope_theta: float | None = _key(
        "base frequency of rotary positions, raised above the model's; empty: its own", None
    )
    position_skipping: bool = _key("spread the positions of each training row over model_max_length (PoSE)", False)
    use_shift_short_attention: bool = _key("S2-Attn in training; false: full attention", True)
    group_size_ratio: float = _key("tokens per attention group, as a share of max_seq_length", 0.25)
    group_size: int | None = _key("tokens per attention group, even; overrides group_size_ratio", None)
    full_attention_ratio: float = _key("share of the steps, at the end, with full attention instead of S2-Attn", 0.0)
    use_flash_attn: bool | None = _key(
        "true: flash kernels or an error; false: never flash; empty: the fastest available kernel", None
    )
    load_in_4bit: bool = _key("frozen base in NF4 with double quantization; false: in the training precision", True)
    frozen_matmul: str = _key(
        "products with frozen weights: unquantized, fp8_backward or fp8 (Ada and newer); auto: by GPU", "auto"
    )
    target_modules: str | list[str] | None = _key(
        "linear layers that get LoRA: comma-separated names or a list; empty: all but lm_head", None
    )
    lora_rank: int = _key("rank of the LoRA matrices", 64)
    lora_alpha: float = _key("LoRA's output is scaled by lora_alpha / lora_rank", 16)
    lora_dropout: float = _key("dropout on LoRA's input", 0.05)
    train_embedding: bool = _key("train the token embedding and lm_head in full", False)
    train_norm: bool = _key("train the normalization weights in full", False)
    sequence_parallel_size: int = _key("processes (GPUs) over which each row is split; 1: none", 1)
    memory_plan: bool = _key("use the fastest memory plan that fits; false: Hugging Face's own layers and loss", True)
    memory_budget_gib: float | None = _key("GPU memory in GiB that this run may use; empty: all of it", None)
    keep_layers: int | None = _key("decoder layers without activation checkpointing; empty: by plan", None)
    keep_attention_layers: int | None = _key("further layers that recompute only the MLP; empty: by plan", None)
    keep_attention_output: bool | None = _key("recomputed layers keep attention's output; empty: by plan", None)
    offload_activations: bool | None = _key("offload what recomputed layers save to CPU memory; empty: by plan", None)
    mlp_tile_tokens: int | None = _key("tokens per MLP tile, 0: no tiling; empty: by plan", None)
    use_liger_kernel: bool | None = _key("Liger's norms, rope and SwiGLU; empty: if available (Ampere+)", None)
    loss_chunk_tokens: int | None = _key("tokens whose logits exist at the same time; empty: by plan", None)
    cuda_graph: bool = _key("launch micro-batches of whole rows as one CUDA graph; for short rows on one GPU", False)
    overwrite_output_dir: bool = _key("start from scratch in an output_dir that already holds a run", False)

    @property
    def data(self) -> dict[str, typing.Any]:
        """The fields of `component.data.dataset.SampleOptions`."""
        names = ("max_seq_length", "sft", "truncation_policy", "template", "max_bad_fraction")
        return {name: getattr(self, name) for name in names}

    @property
    def in_float8(self) -> bool:
        return self.frozen_matmul in FLOAT8

    @property
    def float8_forward(self) -> bool:
        return self.frozen_matmul == "fp8"

    @property
    def group_tokens(self) -> int | None:
        """Group size in tokens: `group_size`, or the ratio's share of `max_seq_length` made even; None without S2."""
        if not self.use_shift_short_attention:
            return None
        return self.group_size or max(2, int(self.group_size_ratio * self.max_seq_length) // 2 * 2)

    @property
    def compared(self) -> dict[str, typing.Any]:
        """What a resumed run compares with the run that wrote its checkpoint."""
        return dataclasses.asdict(self) | {"group_size": self.group_tokens}

    def record(self, extended: "PretrainedConfig", factor: float) -> dict[str, typing.Any]:
        """The part of `longqlora.json` that is known before training; `extended` is the config scaled by `factor`."""
        base, kind = Path(self.model_name_or_path), extended.rope_parameters.get("rope_type", "default")
        if self.rope_type == "theta" and factor > 1:  # a config does not tell that its base frequency was raised
            kind = "theta"
        return {
            "base_model": str(base.resolve()) if base.is_dir() else self.model_name_or_path,
            "context_tokens": self.model_max_length,
            "max_seq_length": self.max_seq_length,
            "rope_type": kind,
            "rope_factor": factor,
            "rope_theta": extended.rope_parameters["rope_theta"],
            "template": self.template if self.sft else None,
            "group_size": self.group_tokens,
            "arguments": dataclasses.asdict(self),
        }

    @property
    def target_names(self) -> list[str] | None:
        if self.target_modules is None:
            return None
        names = self.target_modules.split(",") if isinstance(self.target_modules, str) else self.target_modules
        return [name.strip() for name in names if name.strip()]


# Keys of transformers 4's TrainingArguments that 5 no longer has -> what to write instead.
REMOVED = {
    "adafactor": "write optim: adafactor",
    "dispatch_batches": "write it inside accelerator_config",
    "evaluation_strategy": "write eval_strategy",
    "fsdp_min_num_params": "leave it out",
    "fsdp_transformer_layer_cls_to_wrap": "leave it out",
    "group_by_length": "write train_sampling_strategy: group_by_length",
    "include_inputs_for_metrics": "leave it out",
    "include_tokens_per_second": "leave it out; every log line has tokens per second",
    "jit_mode_eval": "leave it out",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "mp_parameters": "leave it out",
    "no_cuda": "write use_cpu",
    "past_index": "leave it out",
    "per_gpu_eval_batch_size": "write per_device_eval_batch_size",
    "per_gpu_train_batch_size": "write per_device_train_batch_size",
    **dict.fromkeys(
        ["push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"],
        "leave it out; upload the finished adapter: hf upload OWNER/NAME OUTPUT_DIR",
    ),
    "ray_scope": "leave it out",
    "save_safetensors": "leave it out; adapters are always safetensors",
    "sharded_ddp": "use deepspeed",
    "split_batches": "write it inside accelerator_config",
    "torchdynamo": "write torch_compile_backend",
    "tpu_metrics_debug": "leave it out",
    "tpu_num_cores": "leave it out",
    "use_ipex": "leave it out",
    "use_mps_device": "leave it out",
    "warmup_ratio": "write warmup_steps: a number below 1 is a share of the steps",
    **dict.fromkeys(["fp16_backend", "half_precision_backend", "fp16_opt_level"], "leave it out; fp16: true suffices"),
}


def unknown_key(key: str, known: typing.Iterable[str]) -> str:
    return f"transformers 5 removed it; {REMOVED[key]}" if key in REMOVED else f"unknown key{nearest(key, known)}"


def trainer_keys() -> set[str]:
    """The fields of transformers.TrainingArguments, read from its source: the import would take seconds."""
    package = importlib.util.find_spec("transformers")
    assert package is not None
    assert package.origin is not None
    tree = ast.parse((Path(package.origin).parent / "training_args.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments"]
    fields = [node.target for node in classes[0].body if isinstance(node, ast.AnnAssign)]
    return {target.id for target in fields if isinstance(target, ast.Name)}


def read_command_line(argv: list[str]) -> tuple[str, dict[str, typing.Any]]:
    """The YAML file that the command line names, and its keys and values with the overrides; values are not checked.

    Raises:
        UserError: no such file, not YAML, or overrides without a value or of no known key.
    """
    file, overrides = _parse_command_line(argv)
    known = trainer_keys() | {item.name for item in dataclasses.fields(LongQLoRAArguments)} if overrides else set()
    if problems := [
        f"--{key} {value}: {unknown_key(key, known)}" for key, value in overrides.items() if key not in known
    ]:
        raise UserError("; ".join(problems))
    return file, {**read_yaml(file), **overrides}


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
    parser.add_argument("--quiet", **QUIET)
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
