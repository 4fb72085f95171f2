"""ruler.py: the whole way from a model to the table, the JSON and the figure.

python -m pytest tests/script/evaluate/test_ruler.py -m slow
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

from component.evaluate.ruler_prompt import SampleMaker
from component.evaluate.ruler_task import TASKS
from component.loading import end_ids
from component.rope import extend_context
from tests.outcome import refused_by_us
from tests.processes import torchrun
from tests.words import write_lines

RULER = "script/evaluate/ruler.py"


def test_results(run_program, tmp_path, adapter_folder):
    """A tiny model with random weights fails the tasks."""
    words = [
        "--lengths",
        1700,
        1650,
        "--samples",
        2,
        "--seed",
        1,
        "--peft_model",
        adapter_folder,
        "--tasks",
        "vt",
        "fwe",
    ]
    files = ["--output_json", tmp_path / "ruler.json", "--figure", tmp_path / "ruler.png"]
    outcome = run_program(RULER, *words, *files)
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "ruler.json").read_text())
    assert (found["lengths"], found["tasks"]) == ([1650, 1700], ["vt", "fwe"])
    assert found["scores"] == [[0.0, 0.0], [0.0, 0.0]]
    assert (found["means"], found["relative_to_shortest"]) == ([0.0, 0.0], [None, None])
    assert [bar["tokens"] for bar in found["effective_length"]] == [None, None]
    assert (found["rope_factor"], found["context_tokens"], found["decoding"]) == (2.0, 128, "greedy")
    assert found["asked"]["template"] == "completion"
    maker = SampleMaker(AutoTokenizer.from_pretrained(adapter_folder), "completion", 1, None, 1700)
    assert [(t["length"], t["task"], t["sample"], t["prompt_tokens"], t["references"]) for t in found["trials"]] == [
        (length, task, number, len(sample.ids), sample.references)
        for length in (1650, 1700)
        for task in ("vt", "fwe")
        for number in range(2)
        for sample in [maker.sample(task, length, number)]
    ]
    assert all(trial["answer"] for trial in found["trials"])
    assert {"command", "hardware", "date", "versions", "seconds"} <= found.keys()
    assert (tmp_path / "ruler.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    lines = outcome.out.splitlines()
    assert lines[-7].split()[-2:] == ["1650", "1700"]
    assert [line.split()[0] for line in lines[-6:-2]] == ["vt", "fwe", "mean", "relative"]
    assert lines[-2].endswith("chat models (85.6): below 1650 tokens")
    assert "template       completion" in lines


def test_the_path_to_a_full_score(run_program, tmp_path, base_folder, monkeypatch):
    """With the references in place of what the model would write, everything behind it gives 100."""
    monkeypatch.setattr(
        "component.evaluate.ruler.model_answer",
        lambda *_: lambda made: [" ".join(one.references).upper() for one in made],
    )
    words = ["--base_model", base_folder, "--lengths", 6000, 7000, "--samples", 1, "--share", 1]
    outcome = run_program(RULER, *words, "--output_json", tmp_path / "r.json")
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["tasks"] == list(TASKS)
    assert found["scores"] == [[1.0, 1.0]] * 11
    assert [bar["tokens"] for bar in found["effective_length"]] == [7000, 7000, 7000]
    assert found["effective_length"][2]["by"] == "1 of the mean at 6000 tokens"


def test_a_model_that_knows_the_answers(run_program, tmp_path, own_base):
    """Trained on the two samples of one seed: it answers these, and none of another seed."""
    tokenizer = AutoTokenizer.from_pretrained(own_base)
    maker = SampleMaker(tokenizer, "completion", 1, None, 400)
    samples = [maker.sample("niah_single_1", 600, number) for number in range(2)]
    answers = [tokenizer(f" {one.references[0]}</s>", add_special_tokens=False).input_ids for one in samples]
    model = LlamaForCausalLM.from_pretrained(own_base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for one, answer in zip(samples, answers, strict=True):
            ids = torch.tensor([one.ids + answer])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(one.ids) - 1 : -1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(own_base)
    for seed, score, batch_size in ((1, 1.0, 2), (1, 1.0, 1), (2, 0.0, 2)):
        words = ["--base_model", own_base, "--lengths", 600, "--samples", 2, "--tasks", "niah_single_1"]
        more = ["--seed", seed, "--batch_size", batch_size, "--output_json", tmp_path / "r.json", "--overwrite"]
        outcome = run_program(RULER, *words, *more)
        assert outcome.status == 0, outcome.err
        found = json.loads((tmp_path / "r.json").read_text())
        assert found["scores"] == [[score]]
        assert found["effective_length"][0]["tokens"] == (600 if score else None)


def test_resume_goes_on_where_it_ended(run_program, tmp_path, base_folder):
    file = tmp_path / "r.json"
    words = ["--base_model", base_folder, "--samples", 2, "--tasks", "vt", "--output_json", file]
    assert run_program(RULER, *words, "--lengths", 1650).status == 0
    record = json.loads(file.read_text())
    record["trials"][1]["answer"] = "marked: not computed again"
    file.write_text(json.dumps(record))
    refused_by_us(run_program(RULER, *words, "--lengths", 1650, 1700), "--output_json", "exists")
    outcome = run_program(RULER, *words, "--lengths", 1650, 1700, "--resume")
    assert outcome.status == 0, outcome.err
    trials = json.loads(file.read_text())["trials"]
    assert [(t["length"], t["sample"]) for t in trials] == [(1650, 0), (1650, 1), (1700, 0), (1700, 1)]
    assert trials[1]["answer"] == "marked: not computed again"
    outcome = run_program(RULER, *words, "--lengths", 1650, "--resume", "--seed", 1)
    refused_by_us(outcome, "--resume", "seed 42, not 1")
    assert "Loading weights" not in outcome.err


def test_resume_from_another_folder(run_program, tmp_path, base_folder, monkeypatch):
    words = ["--samples", 1, "--tasks", "vt", "--lengths", 1650, "--output_json", tmp_path / "r.json"]
    monkeypatch.chdir(base_folder.parent)
    assert run_program(RULER, *words, "--base_model", base_folder.name).status == 0
    monkeypatch.chdir(tmp_path)
    outcome = run_program(RULER, *words, "--base_model", base_folder, "--resume")
    assert outcome.status == 0, outcome.err
    (tmp_path / base_folder.name).symlink_to(shutil.copytree(base_folder, tmp_path / "another"))
    outcome = run_program(RULER, *words, "--base_model", base_folder.name, "--resume")
    refused_by_us(outcome, f"base_model {base_folder}, not {tmp_path / 'another'}")


def test_resume_after_more_training(run_program, tmp_path, adapter_folder):
    """In the folder of the same name, the adapter is another one."""
    adapter = Path(shutil.copytree(adapter_folder, tmp_path / "run"))
    words = ["--peft_model", adapter, "--samples", 1, "--tasks", "vt", "--lengths", 1650, "--resume"]
    words += ["--output_json", tmp_path / "r.json"]
    assert [run_program(RULER, *words).status for _ in range(2)] == [0, 0]
    file = adapter / "adapter_model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    outcome = run_program(RULER, *words)
    refused_by_us(outcome, "--resume", "was measured with another adapter")
    assert "Loading weights" not in outcome.err


def double(file: Path) -> None:
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def test_resume_with_other_weights_or_texts_of_the_same_name(run_program, tmp_path, own_base):
    file = tmp_path / "r.json"
    texts = write_lines(tmp_path / "texts.jsonl", {"text": "The hills are far. " * 50})
    words = ["--base_model", own_base, "--samples", 1, "--tasks", "niah_single_2", "--lengths", 600]
    words += ["--haystack", texts, "--output_json", file, "--resume"]
    assert [run_program(RULER, *words).status for _ in range(2)] == [0, 0]
    record = json.loads(file.read_text())
    write_lines(tmp_path / "texts.jsonl", {"text": "The seas are wide. " * 50})
    refused_by_us(run_program(RULER, *words), "--resume", "was measured with other texts under the same name")
    write_lines(tmp_path / "texts.jsonl", {"text": "The hills are far. " * 50})
    assert run_program(RULER, *words).status == 0
    double(own_base / "model.safetensors")
    refused_by_us(run_program(RULER, *words), "--resume", "was measured with other weights, config or tokenizer under")
    for name in ("base_fingerprint", "adapter_fingerprint", "haystack_fingerprint"):  # older files lack them
        del record["asked"][name]
    file.write_text(json.dumps(record))
    assert run_program(RULER, *words).status == 0


def test_an_extended_model_is_not_beyond_its_context(run_program, own_base):
    """The config of a model with linear positions keeps the original length, which transformers would remind of."""
    words = ["--base_model", own_base, "--samples", 1, "--tasks", "vt", "--lengths", 1650]
    inside = run_program(RULER, *words, "--context_size", 2048)
    assert (inside.status, "maximum length" in inside.err, "warning" in inside.err) == (0, False, False)
    beyond = run_program(RULER, *words, "--context_size", 1024)
    assert "warning: --lengths: 1650 tokens are beyond the model's context of 1024" in beyond.err


def test_rows_of_different_frequencies_are_refused_before_loading(run_program, own_base):
    config = AutoConfig.from_pretrained(own_base)
    extend_context(config, 2048, "dynamic")
    config.save_pretrained(own_base)
    words = ["--base_model", own_base, "--tasks", "vt", "--lengths", 1650, "--batch_size", 2]
    outcome = run_program(RULER, *words, "--samples", 2)
    refused_by_us(outcome, "--batch_size", "set it to 1")
    assert "Loading weights" not in outcome.err
    assert run_program(RULER, *words, "--samples", 1).status == 0


def test_an_answer_ends_as_the_chat_template_ends_it(run_program, own_base, monkeypatch):
    """The end that the model's own config names may be another one."""
    tokenizer, found = AutoTokenizer.from_pretrained(own_base), []
    end = tokenizer.convert_ids_to_tokens(7)
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + end + "{% endfor %}"
    tokenizer.save_pretrained(own_base)

    def model_answer(model, tokenizer):
        found.append(end_ids(model))
        return lambda made: ["" for _ in made]

    monkeypatch.setattr("component.evaluate.ruler.model_answer", model_answer)
    words = ["--base_model", own_base, "--samples", 1, "--tasks", "vt", "--lengths", 1900]
    for template in ("chat", "completion"):
        assert run_program(RULER, *words, "--template", template).status == 0
    assert found == [[1, 7], [1]]


def test_a_users_haystack(run_program, tmp_path, base_folder):
    books = write_lines(tmp_path / "books.jsonl", {"text": "Whales swim. Boats sail far."})
    words = ["--base_model", base_folder, "--lengths", 1200, "--samples", 1, "--tasks", "niah_single_2"]
    outcome = run_program(RULER, *words, "--haystack", books, "--output_json", tmp_path / "r.json")
    assert outcome.status == 0, outcome.err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["asked"]["haystack"] == str(books)
    refused_by_us(run_program(RULER, *words, "--haystack", books, "--output_json", books), "--haystack reads it")


@pytest.mark.parametrize(
    ("template", "flag", "shown"),
    [
        (None, [], "completion"),
        (None, ["--template", "chat"], "vicuna"),
        ("{{ messages[0]['content'] }}", [], "tokenizer"),
        ("{{ messages[0]['content'] }}", ["--template", "completion"], "completion"),
    ],
)
def test_which_template(template, flag, shown, run_program, own_base):
    if template:
        tokenizer = AutoTokenizer.from_pretrained(own_base)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(own_base)
    words = ["--base_model", own_base, "--lengths", 1900, "--samples", 1, "--tasks", "vt"]
    outcome = run_program(RULER, *words, *flag)
    assert outcome.status == 0, outcome.err
    assert f"template       {shown}" in outcome.out.splitlines()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["--base_model", "missing"]),
        (["--base_model", "/no/such"], ["base_model", "/no/such"]),
        (["--base_model", "{base}", "--lengths", "0"], ["--lengths", "0", "at least 1"]),
        (["--base_model", "{base}", "--lengths", "300"], ["--lengths", "300", "niah_single_1", "needs about"]),
        (["--base_model", "{base}", "--samples", "0"], ["--samples", "0", "at least 1"]),
        (["--base_model", "{base}", "--batch_size", "0"], ["--batch_size", "0", "at least 1"]),
        (
            ["--base_model", "{base}", "--tasks", "vt", "niah_singel_1"],
            ["niah_singel_1", "did you mean niah_single_1?"],
        ),
        (["--base_model", "{base}", "--share", "1.5"], ["--share", "1.5", "at most 1"]),
        (["--base_model", "{base}", "--resume"], ["--resume", "--output_json"]),
        (["--base_model", "{base}", "--haystack", "/no/such.jsonl"], ["--haystack", "/no/such.jsonl"]),
        (["--base_model", "{base}", "--figure", "{base}"], ["--figure", "is a folder"]),
    ],
)
def test_mistakes(words, parts, run_program, base_folder):
    outcome = run_program(RULER, *(word.format(base=base_folder) for word in words))
    refused_by_us(outcome, *parts)
    assert "Loading weights" not in outcome.err, "before anything is loaded"


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_several_processes_give_the_same_trials(run_program, tmp_path, adapter_folder, parts):
    """Samples shared out, or each sample shared by two processes."""
    words = ["--lengths", "1650", "1700", "--samples", "3", "--tasks", "vt", "--peft_model", str(adapter_folder)]
    assert run_program(RULER, *words, "--output_json", tmp_path / "one.json").status == 0
    torchrun(RULER, 2, *words, "--sequence_parallel_size", parts, "--output_json", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["trials"] == one["trials"]
    assert two["scores"] == one["scores"]
