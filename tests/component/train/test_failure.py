"""Losses and gradients that are not finite, lost processes, termination: what is said, and what is left alone."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from transformers import AutoTokenizer, TrainerState, TrainingArguments

from component.error import OneProcessError, UserError
from component.train.failure import GradientGuard, check_loss, explained_failures


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def trainer(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    return SimpleNamespace(state=TrainerState(global_step=6, max_steps=9), args=arguments)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite(tokenizer, tmp_path, value):
    ids = torch.tensor([tokenizer("A feather fell on the ground.").input_ids])
    with pytest.raises(OneProcessError) as raised:
        check_loss(torch.tensor(float(value)), 7, ids, tokenizer, str(tmp_path))
    assert str(raised.value).startswith(
        f"step 7: the loss is {value} for the sample that begins with 'A feather fell on the ground.'; lower"
    )
    assert str(raised.value).endswith("No checkpoint was written yet")
    with pytest.raises(OneProcessError, match="for a batch of 2 samples, the first of which begins with 'A feather"):
        check_loss(torch.tensor(float(value)), 7, ids.expand(2, -1), tokenizer, str(tmp_path))
    check_loss(torch.tensor(3e38), 7, ids, tokenizer, str(tmp_path))


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0, torch.tensor(float("nan"))])
def test_gradients_that_are_not_finite(trainer, norm):
    guard = GradientGuard()
    for guard.norm in (None, 0.0, 0.5):
        guard.on_step_end(trainer.args, trainer.state, None)
    guard.norm = norm
    with pytest.raises(UserError, match="step 6: the norm of the gradients is not finite, though the losses are"):
        guard.on_step_end(trainer.args, trainer.state, None)


def test_fp16_skips_steps_until_its_loss_scale_is_below_1(trainer):
    trainer.args.fp16 = True
    guard = GradientGuard()
    guard.norm, scale = float("inf"), 4.0
    guard.scaler = SimpleNamespace(get_scale=lambda: scale)
    for scale in (4.0, 1.0):  # noqa: B007
        guard.on_step_end(trainer.args, trainer.state, None)
    scale = 0.5
    with pytest.raises(UserError, match="step 6: fp16's loss scale is below 1 and gradients still overflow"):
        guard.on_step_end(trainer.args, trainer.state, None)


def test_deepspeeds_loss_scale_at_its_floor(trainer, monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    scaler = DynamicLossScaler(2, 1000, 1, 1, consecutive_hysteresis=False)
    scaler.update_scale(True)
    with pytest.raises(UserError, match="step 7: fp16's loss scale is below 1"), explained_failures(trainer):
        scaler.update_scale(True)


@pytest.mark.parametrize(
    "said",
    [
        "[pair.cc:537] Read error [127.0.0.1]:2471: Connection reset by peer. This is typically caused by",
        "Connection closed by peer [10.0.0.2]:4711",
        "NCCL error in: ProcessGroupNCCL.cpp:3356, remote process exited or there was a network error",
        "Timed out waiting 1800000ms for recv operation to complete",
    ],
)
def test_a_lost_process(trainer, said):
    with pytest.raises(OneProcessError) as raised, explained_failures(trainer):
        raise RuntimeError(said)
    assert str(raised.value).startswith("step 7: another process of this run ended or cannot be reached (")
    assert "its own message says why" in str(raised.value)


@pytest.mark.parametrize(
    "error", [UserError("x: y"), RuntimeError("shapes do not match"), ValueError("closed by peer")]
)
def test_other_errors_pass(trainer, error):
    with pytest.raises(type(error)) as raised, explained_failures(trainer):
        raise error
    assert raised.value is error
