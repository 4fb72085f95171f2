"""What of a stranger's adapter_config.json is used? The keys of plain LoRA and its variants, with checked values.

PEFT imports the module that `megatron_core` names, ignores keys that it does not know, and matches module names with
any regular expression of the file, which may take forever.
"""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig

from component.error import UserError
from component.storage.foreign import read_object

MATCH_SECONDS = 10
PLAIN = re.compile(r"[\w.-]*")  # a name or path without regular expression
NOT_HERE = "is not supported here; use PEFT itself"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**20


def _are(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(part) is kind for part in value)


def _are_indices(value: Any) -> bool:
    return type(value) is int or _are(int)(value)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or _are(str)(value)


def _by_name(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(check(part) for part in value.values())


FLAG = (lambda value: isinstance(value, bool), "true or false")
NAMES = (_are_names, "a list of names, or a regular expression")
USED: dict[str, tuple[Callable[[Any], bool], str]] = {  # key: whether a value is valid, and what is
    "peft_type": (lambda value: value == "LORA", "LORA"),
    "task_type": (lambda value: value == "CAUSAL_LM", "CAUSAL_LM"),
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "rank_pattern": (_by_name(_is_rank), "an object of whole numbers above 0"),
    "alpha_pattern": (_by_name(_is_number), "an object of numbers"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (lambda value: isinstance(value, (bool, str)), "true, false or a name"),
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "layers_pattern": NAMES,
    "modules_to_save": (_are(str), "a list of names"),
    "target_parameters": (_are(str), "a list of names"),
    "layers_to_transform": (_are_indices, "a list of whole numbers"),
    "layer_replication": (_are(list), "a list of pairs"),
    "trainable_token_indices": (
        lambda value: _are(int)(value) or _by_name(_are(int))(value),
        "a list of whole numbers, or an object of such lists",
    ),
    **dict.fromkeys(["fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"], FLAG),
}
REQUIRED = ("r", "lora_alpha")  # null would be replaced by a default
# of no effect on a trained adapter
UNUSED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "loftq_config",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "velora_config",
}  # fmt: skip


def read_adapter_config(file: Path) -> LoraConfig:
    """The LoRA config in an adapter_config.json.

    Raises:
        UserError: it is not LoRA, has a value of another kind, or a key that would change the result.
    """
    values = read_object(file)
    if values.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {values.get('peft_type')!r}, which is not LoRA; use PEFT itself")
    used = {key: value for key, value in values.items() if key in USED and (value is not None or key in REQUIRED)}
    for key, value in used.items():
        is_valid, kind = USED[key]
        if not is_valid(value):
            raise UserError(f"{file}: {key} is {value!r}, not {kind}; download or train the adapter again")
    for key, value in values.items():
        if value and key not in USED and key not in UNUSED:
            raise UserError(f"{file}: {key} is {value!r}, which {NOT_HERE}")
    return LoraConfig(**used)


def check_patterns(config: LoraConfig, names: list[str], source: str) -> None:
    """Refuse regular expressions that can't be matched with `names` of modules in a few seconds.

    Raises:
        UserError: there is one.
    """
    found = [config.target_modules, config.exclude_modules, config.layers_pattern, config.modules_to_save]
    listed = [[part] if isinstance(part, str) else part or () for part in found]
    patterns = {part for parts in (*listed, config.rank_pattern, config.alpha_pattern) for part in parts}
    suspects = sorted(pattern for pattern in patterns if not PLAIN.fullmatch(pattern))
    if not suspects:
        return
    program = (
        "import json, re, sys\n"
        "patterns, names = json.load(sys.stdin)\n"
        "for pattern in patterns:\n"
        "    for form in (pattern, rf'(.*\\.)?({pattern})$', rf'(^|.*\\.){pattern}($|\\..*)'):\n"
        "        compiled = re.compile(form)\n"
        "        for name in names: compiled.match(name), compiled.fullmatch(name)\n"
    )
    command, given = [sys.executable, "-I", "-c", program], json.dumps([suspects, names])
    try:
        done = subprocess.run(command, input=given, timeout=MATCH_SECONDS, text=True, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{source}: adapter_config.json has a regular expression that takes too long to match, one of "
            f"{', '.join(map(repr, suspects))}; list the names of the modules instead"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it can't be compiled"])[-1]
        raise UserError(
            f"{source}: adapter_config.json has an invalid regular expression, one of "
            f"{', '.join(map(repr, suspects))} ({reason}); list the names of the modules instead"
        )
