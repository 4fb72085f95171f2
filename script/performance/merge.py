"""How much memory and time does merge_lora.py take, compared with PEFT's merge_and_unload?

    python script/performance/merge.py --work /tmp/merge-benchmark --output_json figure/merge.json

Each merges the same random-weight model in its own process and writes 16-bit safetensors; the results are compared
tensor by tensor. Needs four times the model's size on the disk of --work, and enough CPU memory for PEFT. Everything
in --work is removed afterwards.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, new_parser
from component.storage.claim import held_result, work_folder
from script.shared.program import in_a_process, run

SHAPE = {  # 1.7 B parameters: LLaMA's proportions, LLaMA2's vocabulary
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
}
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
base, adapter, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, config=AutoConfig.from_pretrained(adapter), dtype=torch.float16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(target, max_shard_size="5GB")
AutoTokenizer.from_pretrained(adapter).save_pretrained(target)
"""


def make_model(base: Path, adapter: Path, rank: int) -> int:
    """Write a random fp16 base and a random adapter on all its linear layers. Returns the base's parameter count."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    from component.adapter import add_adapter
    from component.checkpoint import write_adapter, write_record
    from component.rope import extend_context

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.float16)
    parameters = model.num_parameters()
    model.save_pretrained(base, max_shard_size="2GB")
    tokenizer.save_pretrained(base)
    factor = extend_context(model.config, 8192)
    adapted = add_adapter(model, rank=rank, alpha=16, dropout=0.0, train_norm=True)
    for name, parameter in adapted.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    write_adapter(adapter, adapted, tokenizer, model.config)
    write_record(adapter, {"base_model": str(base), "rope_type": "linear", "rope_factor": factor})
    return parameters


def timed(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Wall-clock seconds, CPU seconds and peak resident memory of a command, as in `/usr/bin/time -v`.

    Call it in a new process: RUSAGE_CHILDREN covers all of a process's children.
    """
    begin = time.monotonic()
    if status := run(command, environment=environment, stderr=subprocess.DEVNULL):
        sys.exit(f"{' '.join(command)} ended with status {status}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_rss_mb": round(used.ru_maxrss * 1024 / 1e6),
    }


def differences(ours: Path, theirs: Path) -> dict[str, float]:
    """Differences of two merged models over all weights."""
    from component.storage.tensor_reader import model_tensors

    left, right = model_tensors(str(ours)), model_tensors(str(theirs))
    assert left.keys() == right.keys()
    largest, total, count, unequal = 0.0, 0.0, 0, 0
    for name, stored in left.items():
        gap = (stored.read().float() - right[name].read().float()).abs()
        largest, total = max(largest, float(gap.max())), total + float(gap.double().sum())
        count, unequal = count + gap.numel(), unequal + int((gap > 0).sum())
    return {"largest": largest, "mean": total / count, "share_unequal": unequal / count}


@exit_on_user_error
def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models, on a disk with 12 GB free")
    parser.add_argument("--rank", type=int, default=64, help="of the adapter (64)")
    parser.add_argument("--repeat", type=int, default=2, help="runs of each; the fastest counts (2)")
    parser.add_argument("--output_json", type=Path, required=True, help="file for the results")
    flags = parser.parse_args()
    with work_folder(flags.work, "merge.py", {}), held_result(flags.output_json):
        measure(flags)


def measure(flags: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=flags.work) as name:
        work = Path(name)
        environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        parameters = in_a_process(make_model, work / "base", work / "adapter", flags.rank)
        ours = [sys.executable, "script/merge_lora.py", "--adapter_name_or_path", f"{work}/adapter", "--check", "no"]
        commands = {
            "ours": [*ours, "--save_path", f"{work}/ours"],
            "ours_nf4": [*ours, "--save_path", f"{work}/nf4", "--base", "nf4"],
            "peft": [sys.executable, "-c", PEFT, f"{work}/base", f"{work}/adapter", f"{work}/peft"],
        }
        runs: dict[str, list[dict]] = {name: [] for name in commands}
        for turn in range(flags.repeat):
            for name, command in commands.items():
                if name == "ours_nf4" and turn:
                    continue  # slow, and PEFT has no counterpart to compare with
                shutil.rmtree(work / name.removeprefix("ours_"), ignore_errors=True)
                runs[name].append(in_a_process(timed, command, environment))
                print(name, runs[name][-1], flush=True)
        write_result(flags.output_json, work, parameters, flags.rank, runs)


def write_result(file: Path, work: Path, parameters: int, rank: int, runs: dict[str, list[dict]]) -> None:
    from component.storage.result import origin, write_json

    best = {name: min(of_name, key=lambda run: run["seconds"]) for name, of_name in runs.items()}
    size = sum(shard.stat().st_size for shard in (work / "base").glob("*.safetensors"))
    result = {
        "model": {**SHAPE, "parameters": parameters, "bytes": size, "rank": rank},
        "best": best,
        "runs": runs,
        "ours_against_peft": differences(work / "ours", work / "peft"),
        "cores": os.cpu_count(),
    }
    about = origin()
    about["command"] = about["command"].replace(str(work.parent), "WORK")
    write_json(file, {**result, **about})
    for name, figures in best.items():
        print(f"{name:<10} {figures['seconds']:>7.1f} s {figures['peak_rss_mb']:>7,} MB")


if __name__ == "__main__":
    main()
