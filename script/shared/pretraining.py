"""How are the small base models of the demo and the experiments pretrained from scratch?

Byte-level BPE, random crops of one token stream, AdamW, and a cosine schedule by time or by steps.
"""

import argparse
import datetime
import math
import platform
import random
import sys
import time
from collections.abc import Iterable

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from component.storage.atomic import check_target

WARMUP_STEPS = 100
EVAL_TOKENS = 2**17


def begin(args: argparse.Namespace) -> torch.device:
    """Check that --output does not exist, set the seed, and return the device to train on."""
    check_target(args.output, "--output")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, seq_length: int | None, *, split_digits: bool = False, **options
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that prepends <s> and, like LLaMA's, has no pad token.

    Args:
        options: further arguments of tokenizers' BpeTrainer.
    """
    bpe = Tokenizer(models.BPE())
    byte_level, digits = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(split_digits)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if split_digits else byte_level
    bpe.decoder = decoders.ByteLevel()
    options |= {"special_tokens": ["<s>", "</s>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, **options)
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=seq_length,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seq_length: int, **shape) -> LlamaForCausalLM:
    """A Llama with random weights; `shape`: arguments of LlamaConfig."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=seq_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> torch.Tensor:
    """(tokens,): <s> text </s> of all texts, shuffled and concatenated."""
    texts = random.Random(seed).sample(texts, len(texts))
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    return torch.tensor([token for one in encoded for token in (*one.ids, tokenizer.eos_token_id)])


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor, length: int) -> float:
    """Mean loss over consecutive windows of `length` tokens, equally weighted."""
    stream = stream[:EVAL_TOKENS]
    windows = stream[: len(stream) // length * length].view(-1, length)
    chunks = windows.split(max(1, 2**14 // length))
    losses = [model(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids) for ids in chunks]
    return sum(losses) / len(windows)


def learning_rate_scale(step: int, progress: float) -> float:
    """Linear warm-up over WARMUP_STEPS times a cosine from 1 to 0 over the run; `progress` in [0, 1]."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizer(model: LlamaForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    norms = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def train(
    model: LlamaForCausalLM, training: torch.Tensor, held_out: torch.Tensor, seq_length: int, args: argparse.Namespace
) -> dict:
    """Train on random crops of the (tokens,) stream for --minutes or --steps. Returns the record of the run."""
    device = training.device.type
    torch._dynamo.config.suppress_errors = True  # where compilation fails, run the model uncompiled
    compiled = torch.compile(model) if training.is_cuda else model
    optimizer = build_optimizer(model, args.learning_rate)
    crop = torch.arange(seq_length, device=device)
    curve, step, progress, next_report, start, measuring = [], 0, 0.0, 0.0, 0.0, 0.0
    while progress < 1:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_scale(step, progress)
        starts = torch.randint(len(training) - seq_length + 1, (args.batch_size, 1), device=device)
        ids = training[starts + crop]
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        train_loss = loss.item()  # waits for the GPU, so that the time below is right
        step += 1
        start = start or time.time()  # the first step compiles and is not counted
        seconds = time.time() - start
        progress = step / args.steps if args.steps else seconds / (60 * args.minutes)
        if progress >= next_report or progress >= 1:
            next_report += 0.02
            training_seconds = seconds - measuring  # without evaluation
            tokens_per_second = round((step - 1) * args.batch_size * seq_length / max(training_seconds, 1e-3))
            held_out_loss = mean_loss(model, held_out, seq_length)
            measuring += time.time() - start - seconds
            curve.append({"step": step, "loss": round(train_loss, 4), "held_out_loss": round(held_out_loss, 4)})
            print(f"step {step} ({progress:.0%}): {curve[-1]}, {tokens_per_second:,} tokens/s", flush=True)
    return {
        "steps": step,
        "tokens_seen": step * args.batch_size * seq_length,
        "seconds": round(seconds, 1),
        "tokens_per_second": tokens_per_second,
        "curve": curve,
    }


def describe(args: argparse.Namespace, seq_length: int) -> dict:
    """Command, hardware, versions and hyperparameters, for the record of a run."""
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
            "seq_length": seq_length,
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
