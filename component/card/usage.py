"""How is a merged model or an adapter loaded in each engine? Commands for a model card, true for its positions.

What each engine makes of a rope type was measured: script/inference/README.md, "Serving".
"""

from dataclasses import dataclass

# model_type -> the architecture's name in GGUF files, the prefix of their keys
GGUF_NAMES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
OUTTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}  # of llama.cpp's converter
COMPARED = ("linear", "yarn", "dynamic")  # in these engines, by tests of this project


@dataclass(frozen=True)
class Loaded:
    """What loading depends on.

    Args:
        rope_type: that the model was trained with; `dynamic` is frozen in a merged model.
        tokens: the context.
        original: tokens of the base's own context.
        dtype: of a merged model's weights.
        model_type: of the config.
        base: hub id of the adapter's base; None if it is known as a folder only.
        template: of instruction tuning, or None.
    """

    rope_type: str
    tokens: int
    original: int
    dtype: str
    model_type: str
    base: str | None
    template: str | None


def merged_usage(model: Loaded) -> str:
    """For a merged model: transformers, vLLM, llama.cpp."""
    said = "`MODEL` stands for this repository's id, or for a folder with its files."
    return "\n\n".join([said, _transformers(model), _vllm(model), _llama_cpp(model)])


def adapter_usage(model: Loaded) -> str:
    """For an adapter: transformers with PEFT; other engines need a merge."""
    base = model.base or "BASE"
    unknown = "" if model.base else ", `BASE` for the base model named above"
    said = f"`ADAPTER` stands for this repository's id, or for a folder with its files{unknown}."
    code = f"""from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

config = AutoConfig.from_pretrained("ADAPTER")  # has the scaled positions; the base's own config has not
base = AutoModelForCausalLM.from_pretrained("{base}", config=config, dtype="auto")
model = PeftModel.from_pretrained(base, "ADAPTER").eval()
tokenizer = AutoTokenizer.from_pretrained("ADAPTER")"""
    loaded = (
        f"transformers 5 with PEFT:\n\n{_block('python', code)}\n\n`AutoPeftModelForCausalLM.from_pretrained` would "
        "load the adapter on the base without the longer context."
    )
    merge = f"python script/merge_lora.py --model_name_or_path {base} --adapter_name_or_path ADAPTER --save_path MODEL"
    served = (
        "vLLM and llama.cpp take positions from the base's config, so do not add the adapter to the base there. Merge "
        "it first, in LongQLoRA's repository, and use the merged model, whose card has the commands:\n\n"
        f"{_block('bash', merge)}"
    )
    return "\n\n".join([said, loaded, served])


def _transformers(model: Loaded) -> str:
    code = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("MODEL")"""
    if model.template:
        code += """
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)"""
    versions = "transformers 5, or 4.57" if model.rope_type in COMPARED else "transformers 5"
    return f"{versions}:\n\n{_block('python', code)}"


def _vllm(model: Loaded) -> str:
    command = f"vllm serve MODEL --dtype {model.dtype}"
    if model.rope_type in COMPARED:
        found = f"It finds the length of {model.tokens} tokens by itself."
        return f"vLLM 0.30 or newer:\n\n{_block('bash', command)}\n\n{found}"
    return f"vLLM (not compared with transformers for these positions):\n\n{_block('bash', command)}"


def _llama_cpp(model: Loaded) -> str:
    outtype, context = OUTTYPES.get(model.dtype, "auto"), model.tokens
    convert = f"python convert_hf_to_gguf.py MODEL --outtype {outtype} --outfile MODEL.gguf"
    serve = f"llama-server -m MODEL.gguf -c {context}"
    intro = "llama.cpp, in its folder, with MODEL a local folder (`hf download`)"
    if model.rope_type not in COMPARED:
        return f"{intro} (not compared with transformers for these positions):\n\n{_block('bash', convert, serve)}"
    name = GGUF_NAMES.get(model.model_type)
    if model.rope_type != "linear" or model.tokens <= model.original or name is None:
        return f"{intro}:\n\n{_block('bash', convert, serve)}"
    length = (
        "PYTHONPATH=gguf-py python gguf-py/gguf/scripts/gguf_set_metadata.py --force MODEL.gguf "
        f"{name}.context_length {context}"
    )
    why = (
        "The second command is needed with `linear` positions: `llama-server` and `llama-cli` stop at the length in "
        f"the file, which the converter takes from the config, {model.original} tokens; `-c` alone does not raise it."
    )
    return f"{intro}:\n\n{_block('bash', convert, length, serve)}\n\n{why}"


def _block(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])
