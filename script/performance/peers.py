"""How fast is a baseline implementation of QLoRA, and how much memory does it take? Started by script/benchmark.py.

    python script/performance/peers.py unsloth --model /tmp/work/7b --data rows.jsonl --length 8192 --output_json one

unsloth   Unsloth's kernels and its offloaded activation checkpointing, full attention
hf        transformers + PEFT as documented (prepare_model_for_kbit_training), full attention by SDPA
hf_liger  the same with Liger kernels
original  the published LongQLoRA without a flash kernel: fp16, rolled S2-Attn, attention scores materialized
One optimizer step per row of the data: rank 64 on all linear layers of an NF4 base, paged AdamW, gradient clipping,
bf16 unless stated. Peak memory is measured after loading the model.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # no heavy imports above: Unsloth patches transformers and must be imported first

from component.cli import exit_on_user_error
from component.storage.claim import claimed

PEERS = ("unsloth", "hf", "hf_liger", "original")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.0, "bias": "none", "target_modules": LINEAR}


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=PEERS)
    parser.add_argument("--model", required=True, help="folder of the base model and its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help='{"text"} lines of at least --length tokens each')
    parser.add_argument("--length", type=int, required=True, help="tokens per step")
    parser.add_argument("--memory_budget_gib", type=float, help="cap PyTorch's GPU memory at this")
    parser.add_argument("--output_json", type=Path, required=True, help="file for the result")
    flags = parser.parse_args()
    with claimed({"--output_json": [flags.output_json]}, {"--model": [flags.model], "--data": [flags.data]}):
        measure(flags)


def measure(flags: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # it helps all of them
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    if flags.kind == "unsloth":
        import unsloth  # noqa: F401
    import torch
    from transformers import AutoTokenizer

    from component.memory.budget import limit_memory
    from component.storage.result import write_json

    limit_memory(flags.memory_budget_gib)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.float16 if flags.kind == "original" else torch.bfloat16
    load = load_unsloth if flags.kind == "unsloth" else load_transformers
    model = load(flags.model, flags.kind, flags.length, dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(flags.model, model_max_length=10**9)
    rows = [json.loads(line)["text"] for line in flags.data.read_text(encoding="utf-8").splitlines()]
    batches = [tokenizer(row, return_tensors="pt").input_ids[:, : flags.length] for row in rows]
    result = train(model, batches, dtype, device)
    write_json(flags.output_json, result)


def load_unsloth(path: str, kind: str, length: int, dtype, device: str):
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(path, max_seq_length=length, load_in_4bit=True, dtype=dtype)
    model = FastLanguageModel.get_peft_model(
        model, **LORA, use_gradient_checkpointing="unsloth", max_seq_length=length, random_state=42
    )
    FastLanguageModel.for_training(model)
    return model


def load_transformers(path: str, kind: str, length: int, dtype, device: str):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AttentionInterface, AutoModelForCausalLM, BitsAndBytesConfig

    factory = AutoModelForCausalLM
    if kind == "hf_liger":
        from liger_kernel.transformers import AutoLigerKernelForCausalLM  # for any family

        factory = AutoLigerKernelForCausalLM
    AttentionInterface.register("rolled_s2", rolled_s2)
    model = factory.from_pretrained(
        path,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="rolled_s2" if kind == "original" else "sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    )
    model.config.use_cache = False
    model = get_peft_model(prepare_model_for_kbit_training(model), LoraConfig(**LORA, task_type="CAUSAL_LM"))
    return model.train()


def rolled_s2(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """(B, H, T, D), keys and values of fewer heads -> (B, T, H, D): groups of T/4 tokens, half of the heads rolled.

    They are rolled by half the group size. As published, keys and values are repeated for grouped-query models.
    """
    import torch

    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    length, half = query.shape[2], query.shape[1] // 2
    group = length // 4

    def rolled(x, by):
        return torch.cat([x[:, :half], x[:, half:].roll(by, dims=2)], dim=1)

    query, key, value = (rolled(x, -group // 2).unflatten(2, (-1, group)) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) * scaling  # (B, H, 4, g, g)
    later = torch.ones(group, group, dtype=torch.bool, device=scores.device).triu(1)
    scores = scores + torch.zeros_like(later, dtype=scores.dtype).masked_fill(later, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return rolled((weights @ value).flatten(2, 3), group // 2).transpose(1, 2), None


def train(model, batches: list, dtype, device: str) -> dict:
    """One optimizer step per batch (1, T). Returns seconds and loss of each step, and peak memory."""
    import torch
    from bitsandbytes.optim import PagedAdamW32bit

    from component.memory.budget import note_device_memory, peak_memory

    on_gpu = device == "cuda"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = (PagedAdamW32bit if on_gpu else torch.optim.AdamW)(parameters, lr=1e-4)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for batch in batches:
        ids = batch.to(device)
        start = time.perf_counter()
        with torch.autocast(device, dtype=dtype, enabled=on_gpu):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the forward and backward pass, not for the optimizer
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if on_gpu:
            note_device_memory()
    tokens = sum(batch.numel() for batch in batches)
    return {"step_seconds": seconds, "losses": losses, "num_input_tokens_seen": tokens} | peak_memory()


if __name__ == "__main__":
    main()
