"""How good is full fine-tuning on the same data with the Hugging Face Trainer? For comparison.

    python script/experiment/train_full.py --train_args_file FILE.yaml

Reads a YAML of train.py and ignores the keys about LoRA, S2-Attn and memory. Writes a plain model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from component.cli import exit_on_user_error, parsed_first
from component.train.argument import LongQLoRAArguments, read_command_line

parsed_first(lambda: read_command_line(sys.argv[1:]))

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from component.attention.interface import use_shift_short_attention
from component.data.collator import RightPadCollator
from component.data.dataset import load_samples
from component.memory.budget import peak_memory
from component.model import load_config
from component.rope import extend_context, own_rope_type
from component.storage.claim import claimed
from component.tokenizer import any_pad_id, load_tokenizer
from component.train.callback import SpeedCallback
from component.train.settings import parse_arguments
from component.train.zero import single_process_environment

WRITTEN = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@exit_on_user_error
def main() -> None:
    single_process_environment()
    args, training_args = parse_arguments(sys.argv[1:])
    written = {"output_dir": [Path(training_args.output_dir) / name for name in WRITTEN]}
    read = {"model_name_or_path": [args.model_name_or_path], "train_file": [args.train_file]}
    with claimed(written, read, overwrite=args.overwrite_output_dir or None):
        train(args, training_args)


def train(args: LongQLoRAArguments, training_args: TrainingArguments) -> None:
    set_seed(training_args.seed)
    config, tokenizer = load_config(args.model_name_or_path), load_tokenizer(args.model_name_or_path)
    extend_context(config, args.model_max_length, args.rope_type or own_rope_type(config))
    config.use_cache = False
    use_shift_short_attention(config, args.group_tokens)  # keeps packed documents apart, as in train.py
    # fp32 weights, computation under autocast
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, config=config, dtype=torch.float32)
    samples, report = load_samples(args.train_file, tokenizer, packing=args.packing, **args.data)
    print(f"full fine-tuning of {model.num_parameters():,} parameters; {report}", flush=True)
    speed = SpeedCallback()
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=samples,
        data_collator=RightPadCollator(any_pad_id(tokenizer)),
        callbacks=[speed],
    )
    metrics = trainer.train().metrics | peak_memory()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", {**metrics, "step_seconds": [round(s, 4) for s in speed.step_seconds]})
    trainer.save_state()
    config.use_cache, config._attn_implementation = True, "sdpa"
    model.config = config
    model.to(torch.float16).save_pretrained(training_args.output_dir)
    tokenizer.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main()
