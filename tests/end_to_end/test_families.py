"""Today's model families from end to end: sft with their own chat templates, merge, check, chat.

Tiny models with what is each family's own: Llama 3's header tokens and scaled positions, Qwen2's biases and ChatML,
Mistral's [INST]. A model learns one answer by heart, so where it stops is what it was taught.
"""

import json
from pathlib import Path

import pytest
import yaml
from tokenizers import AddedToken, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from component.data.chat_template import answer_end, encode_conversation
from component.data.document import IGNORE_INDEX
from component.inference.generate import generate
from component.inference.load import load_from_flags, new_conversation
from tests.generation_flags import flags
from tests.reference.plain_path import add_noise, tiny_base, tiny_config
from tests.train_run import BASIC

LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA_3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {  # model type, template, its special tokens, bos, eos, ends in generation_config.json, end of an answer
    "llama-3-instruct": (
        "llama", LLAMA_3, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>"], "<|begin_of_text|>", "<|eot_id|>", ["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>",
    ),
    "llama-3.1": (  # its tokenizer names the end of a text, the template the end of a turn
        "llama", LLAMA_3, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>", ["<|end_of_text|>", "<|eot_id|>"], "<|eot_id|>",
    ),
    "qwen2.5-instruct": (
        "qwen2", CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>",
        ["<|im_end|>", "<|endoftext|>"], "<|im_end|>",
    ),
    "qwen2.5": (  # a base: it has the template, but only the end of a text
        "qwen2", CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>", ["<|endoftext|>"],
        "<|im_end|>",
    ),
    "mistral": (
        "mistral", MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", ["</s>"], "</s>",
    ),
}  # fmt: skip
QUESTION, ANSWER = "Who jumps over the dog?", "The quick brown fox."


def make_base(folder: Path, family: str, trained_bpe) -> PreTrainedTokenizerFast:
    """Weights, config, generation config and tokenizer, as the family's folders on the hub have them."""
    kind, template, special, bos, eos, ends, _ = FAMILIES[family]
    words = type(trained_bpe).from_str(trained_bpe.to_str())
    words.add_special_tokens([AddedToken(word, normalized=False) for word in special])
    words.post_processor = processors.ByteLevel(trim_offsets=kind == "llama")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos, eos_token=eos, chat_template=template)
    tokenizer.save_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(ends)
    more = {"rope_parameters": LLAMA_3_ROPE} if family == "llama-3.1" else {}
    more |= {"sliding_window": None} if kind == "mistral" else {}
    config = tiny_config(kind, s2=False, vocab_size=len(tokenizer) + 60, eos_token_id=ids[0], **more)
    model = tiny_base(config)
    add_noise(model, "bias")
    model.generation_config = GenerationConfig(eos_token_id=ids if len(ids) > 1 else ids[0])
    model.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_learns_to_end_its_turn_and_keeps_that_when_merged(family, run_program, trained_bpe, tmp_path):
    *_, ends, end = FAMILIES[family]
    base, out, merged = (tmp_path / name for name in ("base", "out", "merged"))
    tokenizer = make_base(base, family, trained_bpe)
    end_id = tokenizer.convert_tokens_to_ids(end)
    _, labels = encode_conversation(tokenizer, [(QUESTION, ANSWER), (QUESTION, ANSWER)], None, "tokenizer")
    learnt = [label for label in labels if label != IGNORE_INDEX]
    assert tokenizer.decode(learnt).replace(" The", "The") == f"{ANSWER}{end}" * 2
    assert answer_end(tokenizer) == end_id

    (tmp_path / "data.jsonl").write_text(json.dumps({"input": QUESTION, "output": ANSWER}) + "\n")
    values = {**BASIC, "sft": True, "template": "tokenizer", "model_name_or_path": str(base), "output_dir": str(out)}
    values |= {"train_file": str(tmp_path / "data.jsonl"), "max_steps": 100, "per_device_train_batch_size": 1}
    values |= {"lora_rank": 16, "learning_rate": 5e-3, "group_size": 300, "train_embedding": True}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**values, "num_train_epochs": 100, "save_strategy": "no"}))
    outcome = run_program("train.py", "--train_args_file", tmp_path / "run.yaml")
    assert outcome.status == 0, outcome.err
    words = ("--adapter_name_or_path", out, "--save_path", merged, "--dtype", "float32", "--check", "yes")
    outcome = run_program("script/merge_lora.py", *words)
    assert outcome.status == 0, outcome.err
    assert "logits differ" in outcome.out + outcome.err

    for flag, folder in (("--adapter_name_or_path", out), ("--model_name_or_path", merged)):
        given = flags(flag, str(folder), "--max_new_tokens", "60")
        model, loaded = load_from_flags(given)
        given.template = given.system = None
        given.do_sample, given.repetition_penalty = False, 1.0
        prompt = new_conversation(loaded, given).prompt_ids(QUESTION)
        assert generate(model, loaded, prompt, given, lambda piece: None).strip() == ANSWER

    kept = AutoTokenizer.from_pretrained(merged)
    assert kept.chat_template == tokenizer.chat_template
    found = GenerationConfig.from_pretrained(merged).eos_token_id
    known = {end_id, *tokenizer.convert_tokens_to_ids(ends)}
    assert (set(found) if isinstance(found, list) else {found}) == known
    stock = AutoModelForCausalLM.from_pretrained(merged)  # as servers do: with the folder's own settings
    asked = kept.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = stock.generate(**asked, max_new_tokens=60, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert kept.decode(answer).strip() == ANSWER + end
