"""Which checkpoints a run may continue."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from transformers import TrainingArguments

from component.distributed.strategy import Strategy
from component.error import UserError
from component.train.argument import LongQLoRAArguments
from component.train.resume import (
    FIXED,
    OF_TRAINER,
    TOLD,
    check_continuation,
    compared,
    distribution,
    of_trainer,
    recorded_matmul,
    steps_of,
)

WRITTEN = {"files": {}, "base_model": "x", "rope_type": "linear", "rope_factor": 2}


def arguments(**values) -> LongQLoRAArguments:
    return LongQLoRAArguments("model", "a.jsonl", False, 64, 64, **values)


@pytest.fixture
def written_by(tmp_path):
    """written_by(strategy, samples): a checkpoint's folder; without samples one of an earlier version's."""

    def write(strategy: Strategy, samples: int | None) -> str:
        args = TrainingArguments(tmp_path, use_cpu=True)
        record = WRITTEN | (distribution(strategy, samples, args, arguments()) if samples else {})
        (tmp_path / "longqlora.json").write_text(json.dumps(record))
        if strategy.zero_stage is not None:
            (tmp_path / "global_step4").mkdir(exist_ok=True)
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (Strategy(), Strategy()),
        (Strategy(2), Strategy()),
        (Strategy(), Strategy(4, sequence_processes=2)),
        (Strategy(2, 2), Strategy(2, 2)),
        (Strategy(2, 2), Strategy(2, 2, offloads_optimizer=True)),
        (Strategy(4, 3), Strategy(4, 3, sequence_processes=4)),
    ],
)
@pytest.mark.parametrize("samples", [8, None])
def test_continued(written_by, then, now, samples):
    check_continuation(written_by(then, samples), now, 8)
    check_continuation(None, now, 8)


@pytest.mark.parametrize(
    ("then", "now", "message"),
    [
        (Strategy(2, 2), Strategy(2), "was written by DeepSpeed ZeRO-2, whose optimizer states this run (DDP) cannot "
         "read; set deepspeed to a file with ZeRO-2 and start 2 processes"),
        (Strategy(1, 2), Strategy(), "by DeepSpeed ZeRO-2, whose optimizer states this run (one process) cannot read; "
         "set deepspeed to a file with ZeRO-2 and start 1 process"),
        (Strategy(2), Strategy(2, 3), "was written without DeepSpeed, whose optimizer states this run (ZeRO-3) cannot "
         "read; leave deepspeed out"),
        (Strategy(2, 2), Strategy(2, 3), "was written by DeepSpeed ZeRO-2, whose optimizer states this run (ZeRO-3) "
         "cannot read; set deepspeed to a file with ZeRO-2 and start 2 processes"),
        (Strategy(2, 2), Strategy(4, 2), "was written by ZeRO-2 on 2 processes, each with its part of the optimizer "
         "states, and this run has 4; start 2"),
        (Strategy(2, 3), Strategy(1, 3), "on 2 processes, each with its part of the optimizer states, and this run "
         "has 1; start 2"),
    ],
)  # fmt: skip
def test_refused(written_by, then, now, message):
    with pytest.raises(UserError) as raised:
        check_continuation(written_by(then, 8), now, 8)
    assert message in str(raised.value)


def test_samples_per_step(written_by):
    with pytest.raises(
        UserError, match=r"with 8 samples a step, and this run takes 4, so .* sequence_parallel_size, is 8"
    ):
        check_continuation(written_by(Strategy(2), 8), Strategy(), 4)


def test_an_earlier_versions_checkpoint(written_by):
    with pytest.raises(UserError, match=r"by DeepSpeed, whose .* set deepspeed to a file with the same stage$"):
        check_continuation(written_by(Strategy(2, 2), None), Strategy(), 8)


ARGUMENTS = {
    "rope_type": None,
    "lora_alpha": 16,
    "packing": False,
    "frozen_matmul": "unquantized",
    "train_file": "a.jsonl",
}
TRAINER = {"learning_rate": 2e-4, "seed": 42}


@pytest.fixture
def checkpoint(tmp_path):
    written = WRITTEN | {"arguments": ARGUMENTS | {"group_size": None}, "trainer": TRAINER, "group_size": 32}
    (tmp_path / "longqlora.json").write_text(json.dumps(written))
    return str(tmp_path)


def changed(checkpoint: str, **values) -> dict[str, str]:
    return check_continuation(checkpoint, Strategy(), 8, ARGUMENTS | TRAINER | {"group_size": 32} | values)


@pytest.mark.parametrize("values", [{}, {"lora_alpha": 16.0}, {"rope_type": "linear"}, {"mlp_tile_tokens": 128}])
def test_the_same_arguments(checkpoint, values):
    assert changed(checkpoint, **values) == {}


def test_what_a_resumed_run_may_change_is_told(checkpoint):
    told = changed(checkpoint, frozen_matmul="fp8", train_file="b.jsonl", group_size=16)
    line = "with other losses than an unbroken run: frozen_matmul unquantized -> fp8, train_file a.jsonl -> b.jsonl"
    assert told == {"resumed": f"{line}, group_size 32 -> 16"}


def test_steps_of_a_checkpoint(checkpoint):
    assert steps_of(None) == 0
    file = Path(checkpoint) / "longqlora.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": 7}))
    assert steps_of(checkpoint) == 7
    file.unlink()
    assert steps_of(checkpoint) == 0


def test_auto_in_an_older_record_was_unquantized(checkpoint):
    file = Path(checkpoint) / "longqlora.json"
    old = json.loads(file.read_text())
    old["arguments"]["frozen_matmul"] = "auto"
    file.write_text(json.dumps(old))
    assert changed(checkpoint) == {}
    assert recorded_matmul(checkpoint) == "unquantized"
    del old["arguments"]["frozen_matmul"]  # older still
    file.write_text(json.dumps(old))
    assert changed(checkpoint) == {}
    assert recorded_matmul(checkpoint) == "unquantized"
    assert recorded_matmul(None) is None
    assert "frozen_matmul unquantized -> fp8_backward" in changed(checkpoint, frozen_matmul="fp8_backward")["resumed"]


def test_what_it_may_not_change_is_refused_at_once(checkpoint):
    with pytest.raises(UserError) as raised:
        changed(checkpoint, rope_type="yarn", lora_alpha=32, packing=True, learning_rate=1e-4, frozen_matmul="fp8")
    head, *found = str(raised.value).splitlines()
    assert head.endswith("was written by a run with other values; set them as they were, or start another run:")
    assert [line.strip() for line in found] == [
        "rope_type: yarn, but it was linear: what was trained so far would be read by another model",
        "lora_alpha: 32, but it was 16: what was trained so far would be read by another model",
        "packing: True, but it was False: samples would repeat or be left out",
        "learning_rate: 0.0001, but it was 0.0002: the optimizer's states and its settings come from the checkpoint, "
        "so it would have no effect",
    ]


def test_all_keys_are_known():
    names = {item.name for item in (*fields(LongQLoRAArguments), *fields(TrainingArguments))}
    assert names >= {*FIXED, *TOLD, *OF_TRAINER}
    assert FIXED.keys() >= set(OF_TRAINER)


def test_the_optimizers_keys_are_recorded(tmp_path):
    args = TrainingArguments(tmp_path, use_cpu=True, optim="adamw_torch", learning_rate=3e-4, seed=7)
    found = json.loads(json.dumps(distribution(Strategy(), 8, args, arguments())))["trainer"]
    assert (found["optim"], found["learning_rate"], found["seed"], found["data_seed"]) == (
        "adamw_torch",
        3e-4,
        7,
        None,
    )
    assert found == of_trainer(args)


class TestFilesOfTheSameName:
    """A checkpoint, and the texts that it was trained and evaluated on."""

    @pytest.fixture
    def run(self, tmp_path):
        """run(write=False, **TrainingArguments' and our keys): what the summary says of a resumed run."""
        for name in ("a", "b", "e"):
            (tmp_path / f"{name}.jsonl").write_text(name)

        def run(write: bool = False, **keys) -> dict[str, str]:
            train_file, eval_file = keys.pop("train_file", "a.jsonl"), keys.pop("eval_file", "e.jsonl")
            args = LongQLoRAArguments(
                "m",
                str(tmp_path / train_file),
                False,
                64,
                64,
                eval_file=str(tmp_path / eval_file),
                frozen_matmul="unquantized",
            )
            trainer = TrainingArguments(tmp_path / "out", use_cpu=True, **keys)
            if write:
                record = (
                    WRITTEN
                    | {"arguments": args.compared, "group_size": args.group_tokens}
                    | distribution(Strategy(), 8, trainer, args)
                )
                (tmp_path / "longqlora.json").write_text(json.dumps(record))
            return check_continuation(str(tmp_path), Strategy(), 8, compared(args, trainer))

        run(write=True)
        return run

    def test_nothing_changed(self, run):
        assert run() == {}

    def test_other_texts(self, run, tmp_path):
        (tmp_path / "a.jsonl").write_text("others")
        told = f"with other losses than an unbroken run: train_file {tmp_path / 'a.jsonl'} with other content"
        assert run() == {"resumed": told}
        (tmp_path / "a.jsonl").write_text("a")
        assert run() == {}
        assert "a.jsonl -> " in run(train_file="b.jsonl")["resumed"]

    def test_a_folder_of_texts_that_holds_the_run(self, run, tmp_path):
        """What is no training data may change: here the run's own files, and notes."""
        texts = tmp_path / "texts"
        texts.mkdir()
        (texts / "a.jsonl").write_text("a")
        run(write=True, train_file="texts")
        (texts / "out").mkdir()
        (texts / "out/a.jsonl").write_text("more")
        (texts / "README.txt").write_text("notes")
        assert run(train_file="texts") == {}
        (texts / "b.jsonl").write_text("b")
        assert run(train_file="texts")["resumed"].endswith(f"train_file {texts} with other content")

    def test_other_schedules(self, run):
        told = run(lr_scheduler_type="constant", max_grad_norm=0.1)["resumed"]
        assert told.endswith("lr_scheduler_type linear -> constant, max_grad_norm 1.0 -> 0.1")

    def test_the_best_checkpoint_is_chosen_on_the_same_texts(self, run, tmp_path):
        best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
        assert run(**best) == {}
        (tmp_path / "moved.jsonl").write_text("e")
        assert "eval_file" in run(**best, eval_file="moved.jsonl")["resumed"]
        with pytest.raises(UserError, match=r"^eval_file: .*b\.jsonl is not what .* was evaluated on"):
            run(**best, eval_file="b.jsonl")
        (tmp_path / "e.jsonl").write_text("others")
        with pytest.raises(UserError, match=r"^eval_file: .*e\.jsonl is not what .* was evaluated on"):
            run(**best)
        assert "eval_file" in run()["resumed"]
