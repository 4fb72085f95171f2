"""Pretrain the demo's base model: a 3.8 M parameter Llama that reads 512 tokens of Python source code.

    python script/demo/pretrain.py --library cpython/*/lib/python3.1* --minutes 2.75 --output script/demo/base
    python script/demo/pretrain.py --steps 20 --batch_size 4 --output /tmp/base        # a try on CPU

The text is Python's standard library, of one or several versions; about 5 % of its modules are held out (stdlib.py).
Writes a folder that `from_pretrained` loads, with pretrain.json, the record of the run. Made on one GPU.
"""

import argparse
import datetime
import json
import math
import platform
import random
import shutil
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from stdlib import default_library, library_name, split_library
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEQ_LENGTH = 512  # tokens, the context that the demo then extends
VOCAB_SIZE = 4096
WARMUP_STEPS = 100
EVAL_LENGTHS = (256, 512, 1024, 2048)  # tokens
EVAL_TOKENS = 2**17


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, nargs="+", default=[default_library()], help="library folders")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="train this long, the learning rate follows the clock")
    length.add_argument("--steps", type=int, help="train this many steps")
    parser.add_argument("--batch_size", type=int, default=256, help=f"sequences of {SEQ_LENGTH} tokens per step")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--num_attention_heads", type=int, default=8, help="query heads; half as many kv heads")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"--output {args.output} exists: remove it or choose another folder")
    for library in args.library:
        if not library.is_dir():
            parser.error(f"--library {library} is not a folder")
    return args


def read_libraries(libraries: list[Path]) -> tuple[list[str], list[str], list[dict]]:
    """Training texts, held-out texts, and a record per library. Each text is taken once, held-out ones first."""
    splits = [split_library(library) for library in libraries]
    held_out = list(dict.fromkeys(text for _, held in splits for text in held.values()))
    seen, training, record = set(held_out), [], []
    for library, (train, held) in zip(libraries, splits, strict=True):
        new = [text for text in dict.fromkeys(train.values()) if text not in seen]
        seen.update(new)
        training += new
        record.append(
            {
                "name": library_name(library),
                "files": len(train) + len(held),
                "held_out_files": len(held),
                "training_files_not_seen_before": len(new),
                "training_bytes_not_seen_before": sum(len(text.encode()) for text in new),
            }
        )
    return training, held_out, record


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that starts every text with <s>; it has no pad token, like LLaMA's."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=SEQ_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> torch.Tensor:
    """<s> text </s> of every text in random order, end to end: (tokens,)."""
    texts = random.Random(seed).sample(texts, len(texts))
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    return torch.tensor([token for one in encoded for token in (*one.ids, tokenizer.eos_token_id)])


def build_model(tokenizer: PreTrainedTokenizerFast, num_attention_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads // 2,
        max_position_embeddings=SEQ_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor, length: int) -> float:
    """Mean loss over windows of `length` tokens, end to end, each window weighing the same."""
    stream = stream[:EVAL_TOKENS]
    windows = stream[: len(stream) // length * length].view(-1, length)
    chunks = windows.split(max(1, 2**14 // length))
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids) for ids in chunks]
    return sum(losses) / len(windows)


def learning_rate_scale(step: int, progress: float) -> float:
    """Linear warm-up over the first steps times a cosine from 1 to 0 over the run; `progress` in [0, 1]."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    norms = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def train(model: LlamaForCausalLM, training: torch.Tensor, held_out: torch.Tensor, args: argparse.Namespace) -> dict:
    """Random crops of the (tokens,) stream until --minutes or --steps are over. Returns the record of the run."""
    device = training.device.type
    torch._dynamo.config.suppress_errors = True  # where compilation fails the model runs as it is
    compiled = torch.compile(model) if training.is_cuda else model
    optimizer = build_optimizer(model, args.learning_rate)
    crop = torch.arange(SEQ_LENGTH, device=device)
    curve, step, progress, next_report, start = [], 0, 0.0, 0.0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_scale(step, progress)
        starts = torch.randint(len(training) - SEQ_LENGTH + 1, (args.batch_size, 1), device=device)
        ids = training[starts + crop]
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        train_loss = loss.item()  # waits for the GPU, so the clock below is true
        step += 1
        start = start or time.time()  # the first step compiles and is not counted
        seconds = time.time() - start
        progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if progress >= next_report or progress >= 1:
            next_report += 0.02
            tokens_per_second = round((step - 1) * args.batch_size * SEQ_LENGTH / max(seconds, 1e-3))
            held_out_loss = mean_loss(model, held_out, SEQ_LENGTH)
            curve.append({"step": step, "loss": round(train_loss, 4), "held_out_loss": round(held_out_loss, 4)})
            print(f"step {step} ({progress:.0%}): {curve[-1]}, {tokens_per_second:,} tokens/s", flush=True)
    return {
        "steps": step,
        "tokens_seen": step * args.batch_size * SEQ_LENGTH,
        "seconds": round(seconds, 1),
        "tokens_per_second": tokens_per_second,
        "curve": curve,
    }


def perplexity_table(folder: Path, held_out: torch.Tensor) -> dict:
    """Held-out perplexity by window length of the saved model, as it is and with positions interpolated by 4."""
    table = {}
    for name, rope in (("default", {"rope_type": "default"}), ("linear 4", {"rope_type": "linear", "factor": 4.0})):
        rope_parameters = {**rope, "rope_theta": 10000.0}
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, rope_parameters=rope_parameters)
        model.to(held_out.device).eval()
        losses = {length: mean_loss(model, held_out, length) for length in EVAL_LENGTHS}
        table[name] = {length: round(math.exp(loss), 3) for length, loss in losses.items()}
        print(f"held-out perplexity, rope {name}: {table[name]}", flush=True)
    return table


def describe(args: argparse.Namespace) -> dict:
    """What made this model: the command, the machine, the versions, the hyperparameters."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "hyperparameters": {
            "seq_length": SEQ_LENGTH,
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": WARMUP_STEPS,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
            "seed": args.seed,
        },
    }


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    training_texts, held_out_texts, libraries = read_libraries(args.library)
    tokenizer = train_tokenizer(training_texts)
    training = token_stream(tokenizer, training_texts, args.seed).to(device)
    held_out = token_stream(tokenizer, held_out_texts, args.seed).to(device)
    model = build_model(tokenizer, args.num_attention_heads).to(device)
    sizes = {
        "training_tokens": len(training),
        "held_out_tokens": len(held_out),
        "parameters": model.num_parameters(),
    }
    print(sizes, flush=True)
    run = train(model, training, held_out, args)

    partial = args.output.with_name(args.output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.to(torch.float16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    perplexity = perplexity_table(partial, held_out)
    record = {**describe(args), "libraries": libraries, **sizes, **run, "held_out_perplexity": perplexity}
    (partial / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.rename(args.output)


if __name__ == "__main__":
    main()
