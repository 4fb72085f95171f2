"""train.py on packed rows, streams and chats: what it computes is what a plain loop over the same documents does.

python -m pytest tests/end_to_end/test_data.py
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from component.data.token_file import write_tokens
from component.memory.cost import Rate
from tests.conftest import TEXTS
from tests.reference.shift_short import LOOP
from tests.train_run import (
    BASIC,
    GROUP,
    TRAIN_TEXTS,
    Launcher,
    executable,
    launched,
    losses,
    record,
    stock_model,
    token_ids,
)

LONGEST = BASIC["max_seq_length"]
PACKED_TEXTS = [*TRAIN_TEXTS, *TEXTS, "Dogs.", "F", "So on, and so on."]
PLANS = {
    "plan": {
        "keep_layers": 0,
        "keep_attention_layers": 1,
        "keep_attention_output": True,
        "offload_activations": True,
        "mlp_tile_tokens": 17,
        "loss_chunk_tokens": 11,
    },
    "no plan": {"memory_plan": False},
}


@pytest.fixture
def run(run_program, base_folder, tmp_path):
    """run(lines, **changes): train in this process; the output folder and what was printed, or the message."""

    def start(lines: list[dict], *, resume: Path | None = None, status: int = 0, **changes):
        number = len(list(tmp_path.glob("*.yaml")))
        out, file = tmp_path / f"out-{number}", tmp_path / f"run-{number}.yaml"
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        values = {**BASIC, "model_name_or_path": str(base_folder), "train_file": str(data), "save_steps": 100}
        if resume is not None:
            shutil.copytree(resume, out / resume.name)
            values["resume_from_checkpoint"] = "auto"
        file.write_text(yaml.safe_dump({**values, "output_dir": str(out), **changes}))
        outcome = run_program("train.py", "--train_args_file", file)
        assert outcome.status == status, outcome.err
        return outcome.err if status else (out, outcome.out)

    return start


def of_texts(texts: list[str]) -> list[dict]:
    return [{"text": text} for text in texts]


def plain_losses(base: Path, out: Path, rows: list[tuple[torch.Tensor, torch.Tensor]], attention: str):
    """Steps over all `rows` (ids, labels) at once, each (1, T) by itself: stock transformers, PEFT and AdamW.

    Returns losses by step, and the adapter's weights by the names that they are saved under.
    """
    stock = stock_model(base, group_size=GROUP, _attn_implementation=attention)
    model = PeftModel.from_pretrained(stock, out / "checkpoint-1", is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # A after the first step is A before it: no gradient reaches it
            parameter.data.zero_()
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    count = sum(int((labels != -100).sum()) for _, labels in rows)
    found = {}
    for step in (1, 2, 3):
        total = 0.0
        for ids, labels in rows:
            logits = model(input_ids=ids, use_cache=False).logits[0].float()
            loss = F.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum", ignore_index=-100) / count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        found[step] = total
    assert found[1] - found[3] > 0.05  # it learnt
    return found, {name.replace(".default", ""): parameter.data for name, parameter in model.named_parameters()}


def assert_equals_plain(out: Path, base: Path, rows, attention: str) -> None:
    expected, weights = plain_losses(base, out, rows, attention)
    assert losses(out) == pytest.approx(expected, abs=2e-5)
    saved = load_file(out / "adapter_model.safetensors")
    assert saved
    for name, weight in saved.items():
        torch.testing.assert_close(weight, weights[name], atol=2e-4, rtol=0)


def learnt_but_the_first(ids: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(row, torch.cat([torch.tensor([[-100]]), row[:, 1:]], dim=1)) for row in ids]


# ---- packing


@pytest.mark.parametrize(("plan", "streaming"), [*((plan, False) for plan in PLANS), (list(PLANS)[-1], True)])
@pytest.mark.parametrize("s2", [True, False], ids=["S2-Attn", "full attention"])
def test_packed_rows_train_as_documents_alone(run, base_folder, s2, plan, streaming):
    """All rows in one step, so that their order changes nothing; nobody's positions are lost on the way."""
    changes = {"packing": True, "use_shift_short_attention": s2, "streaming": streaming, **PLANS[plan]}
    out, printed = run(of_texts(PACKED_TEXTS), save_steps=1, per_device_train_batch_size=3, **changes)
    ids = token_ids(base_folder, PACKED_TEXTS)
    assert_equals_plain(out, base_folder, learnt_but_the_first(ids), LOOP if s2 else "eager")
    assert record(out)["trained_tokens"] == 3 * sum(row.shape[1] for row in ids)
    assert record(out)["group_size"] == (GROUP if s2 else None)
    if not streaming:
        tokens = sum(row.shape[1] for row in ids)
        assert f"packed into 3 rows, {tokens / (3 * LONGEST):.1%} full" in printed


def test_packing_sees_documents_apart(run, monkeypatch):
    """The same rows, were documents to see each other, would give another loss."""
    changes = {"per_device_train_batch_size": 20, "max_steps": 1}
    apart, _ = run(of_texts(PACKED_TEXTS), **changes)
    packed, _ = run(of_texts(PACKED_TEXTS), packing=True, **changes)
    assert losses(packed) == pytest.approx(losses(apart), abs=1e-5)
    monkeypatch.setattr("component.attention.interface.document_spans", lambda position_ids: None)
    mixed, _ = run(of_texts(PACKED_TEXTS), packing=True, **changes)
    assert losses(mixed)[1] != pytest.approx(losses(apart)[1], abs=1e-3)


# ---- streams

STREAM = {
    "streaming": True,
    "max_steps": 9,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lora_dropout": 0.1,  # random numbers are resumed too
}
SHORT_TEXTS = [f"{text[:length]}." for text in TEXTS for length in (9, 31, 50)]  # 15, of different tokens
STREAMED = of_texts(SHORT_TEXTS)  # nine steps of four rows are two passes and more


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_trains_on_what_the_set_on_disk_holds(run, packing):
    """All samples in one step: as losses say, epoch after epoch."""
    changes = {"per_device_train_batch_size": 2 if packing else 15, "packing": packing}
    streamed, printed = run(STREAMED, streaming=True, **changes)
    kept, _ = run(STREAMED, **changes)
    assert losses(streamed) == pytest.approx(losses(kept), abs=1e-5)
    assert losses(kept)[1] - losses(kept)[3] > 0.05
    assert record(streamed)["trained_tokens"] == record(kept)["trained_tokens"]
    assert "streamed from" in printed


def test_a_stream_is_drawn_by_the_seed(run):
    changes = {**STREAM, "max_steps": 5}  # twenty rows: into the second pass
    first, _ = run(STREAMED, **changes)
    again, _ = run(STREAMED, **changes)
    other, _ = run(STREAMED, **changes, seed=7)
    assert len(losses(first)) == 5
    assert losses(again) == losses(first)
    assert losses(other)[1] != pytest.approx(losses(first)[1], abs=1e-3)


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_goes_on_as_if_nothing_had_happened(run, packing):
    """... in the middle of its first pass, and of the third."""
    changes = {**STREAM, "packing": packing, "max_seq_length": 40, "group_size": 12}
    if packing:
        changes["gradient_accumulation_steps"] = 1  # seven rows make a pass
    unbroken, _ = run(STREAMED, **changes, save_steps=1)
    assert len(losses(unbroken)) == 9
    for step in (2, 8):
        resumed, _ = run(STREAMED, **changes, resume=unbroken / f"checkpoint-{step}")
        assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-6)
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (resumed, unbroken))
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=0)


def test_a_stream_of_tokens(run, base_folder, tmp_path):
    """A .bin file and its index: documents as they are in the texts, whatever pass it is."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in SHORT_TEXTS]
    write_tokens(tmp_path / "tokens.bin", iter(ids), tokenizer, name="base")
    changes = {"packing": True, "per_device_train_batch_size": 2}
    streamed, _ = run(STREAMED, streaming=True, **changes, train_file=str(tmp_path / "tokens.bin"))
    kept, _ = run(STREAMED, **changes)
    assert losses(streamed) == pytest.approx(losses(kept), abs=1e-5)


def test_a_stream_that_turns_out_bad_is_one_message(run):
    lines = of_texts(SHORT_TEXTS)
    error = run([*lines, {"txt": "no text"}], **STREAM, status=1)
    assert "1 of 16 lines can't be used, more than max_bad_fraction 0.01 allows" in error
    assert 'data.jsonl:16: no "text" (its keys: txt)' in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"streaming": True, "max_steps": -1},
            "streaming: true, but a stream has no known length; set max_steps",
        ),
        ({"truncation_policy": "split", "sft": True}, "truncation_policy: split, but a chat (sft: true) cannot be"),
        ({"truncation_policy": "cut"}, "truncation_policy: 'cut'; use one of truncate, split, drop"),
        ({"template": "chatml", "sft": True}, "template: 'chatml'; use one of vicuna, tokenizer"),
        ({"template": "tokenizer"}, "template: only used with sft: true"),
        ({"streaming": True, "save_strategy": "epoch"}, "epoch, but a stream has no epochs; use steps"),
        ({"max_bad_fraction": 1}, "max_bad_fraction: 1.0; use a share in [0, 1)"),
    ],
)
def test_settings_that_make_no_sense(run, changes, problem):
    error = run(STREAMED, **changes, status=1)
    assert problem in error
    assert "Traceback" not in error


# ---- chats

CHATS = [
    {"input": "Who jumps?", "output": "The fox."},
    {"messages": [{"role": "user", "content": "Over whom?"}, {"role": "assistant", "content": "The dog."}]},
    {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Half of what?"},
            {"from": "gpt", "value": "Of the heads, in groups that are moved by half a group."},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "So."},
        ]
    },
]
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']\n' + m.content + (eos_token if m.role == 'assistant' else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
SPELT = [  # (not learnt, learnt) in turn
    ["[user]\nWho jumps?\n[assistant]\n", "The fox.</s>"],
    ["[user]\nOver whom?\n[assistant]\n", "The dog.</s>"],
    [
        "[system]\nBe brief.\n[user]\nHalf of what?\n[assistant]\n",
        "Of the heads, in groups that are moved by half a group.</s>",
        "[user]\nWhy?\n[assistant]\n",
        "So.</s>",
    ],
]


@pytest.mark.parametrize("packing", [False, True])
def test_chats_by_the_models_own_template(run, base_folder, tmp_path, packing):
    """Every answer is learnt, and nothing else: the losses of a plain loop, which puts the pieces together by hand."""
    base = tmp_path / "chat-base"
    shutil.copytree(base_folder, base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    changes = {"sft": True, "template": "tokenizer", "model_name_or_path": str(base), "packing": packing}
    out, _ = run(CHATS, **changes, per_device_train_batch_size=20, save_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    rows = []
    for pieces in SPELT:
        encoded = tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
        ends = [sum(map(len, pieces[: at + 1])) for at in range(len(pieces))]
        at_piece = [next(at for at, end in enumerate(ends) if last <= end) for _, last in encoded.offset_mapping]
        labels = [token if at % 2 else -100 for token, at in zip(encoded.input_ids, at_piece, strict=True)]
        assert "".join(pieces[1::2]) == tokenizer.decode([label for label in labels if label != -100])
        rows.append((torch.tensor([encoded.input_ids]), torch.tensor([labels])))
    assert_equals_plain(out, base_folder, rows, LOOP)


@pytest.mark.parametrize("packing", [False, True])
def test_what_a_run_will_cost_is_told_before_its_first_step(run, packing, monkeypatch):
    """Disk; and time where a GPU's rate is known, with the steps of both kinds of attention."""
    lines = of_texts(PACKED_TEXTS)
    out, printed = run(lines, packing=packing, max_steps=4, save_steps=1, save_total_limit=2)
    assert re.search(r"^ +disk +up to .* GiB: 3 checkpoints of .* GiB at the same time$", printed, re.MULTILINE)
    assert not re.search(r"^ +time ", printed, re.MULTILINE)
    saved = [out / "checkpoint-4" / name for name in ("adapter_model.safetensors", "optimizer.pt")]
    gib = float(re.search(r"3 checkpoints of (\S+) GiB", printed)[1])
    assert gib * 2**30 == pytest.approx(sum(file.stat().st_size for file in saved), rel=0.5)  # with names, and headers

    rate = Rate(matrix=1e9, attention=1e9, full_attention=1e9, bandwidth=1e9, link=1e9)
    monkeypatch.setattr("component.train.summary.measured_rate", lambda *_: rate)
    _, printed = run(lines, packing=packing, max_steps=4, full_attention_ratio=0.25)
    told = r"expected from this GPU's rate: (\S+) s per step, (\S+) s in the last 1 with full attention; (\S+) h for 4"
    step, full, hours = (float(number) for number in re.search(told, printed).groups())
    assert full > step
    assert hours == pytest.approx((3 * step + full) / 3600, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_two_processes_share_a_stream(base_folder, tmp_path, tmp_path_factory, packing):
    """Each step is over the same rows, whoever takes them: into the second pass and further."""
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in STREAMED), encoding="utf-8")
    files = {"model_name_or_path": str(base_folder), "train_file": str(tmp_path / "data.jsonl"), "packing": packing}
    values = {**BASIC, **STREAM, **files, "max_seq_length": 40, "lora_dropout": 0.0, "save_steps": 100}
    curves, yaml_files = [], Launcher(tmp_path_factory.mktemp("runs"))
    for processes in (1, 2):
        dealt = {"gradient_accumulation_steps": 2 // processes, "output_dir": str(tmp_path / f"out-{processes}")}
        launcher = [executable("torchrun"), f"--nproc_per_node={processes}"]
        curves.append(losses(launched(launcher, {**values, **dealt}, yaml_files)))
    assert len(curves[0]) == 9
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
