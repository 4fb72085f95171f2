"""How is it trained, resumed, saved? By the Hugging Face Trainer, with three things of ours.

Checkpoints are adapter folders whose record is written last, so a killed run knows its newest whole one. Evaluation
weighs tokens alike whatever batch they fall in, with full attention, since modules evaluate with full attention. And a
run says what it is about to do before its first step.
"""

import math
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import EvalPrediction, PretrainedConfig, Trainer

from component.checkpoint import remove_old_checkpoints, write_adapter, write_record
from component.data import IGNORE_INDEX
from component.distributed.strategy import Strategy
from component.loss import next_token_losses
from component.train.callback import SpeedCallback
from component.train.zero import GradientCallback


class LongQLoRATrainer(Trainer):
    """The Hugging Face Trainer, writing adapter folders and measuring perplexity by the token.

    Args:
        extended_config: the config that goes into adapter folders.
        record: what `longqlora.json` says of this run; steps and tokens are added when it is written.
        strategy: how training is distributed.
    """

    def __init__(self, *args, extended_config: PretrainedConfig, record: dict, strategy: Strategy, **kwargs):
        super().__init__(*args, compute_metrics=token_weighted_loss, **kwargs)
        self.extended_config = extended_config
        self.record = record
        self.strategy = strategy
        self.speed = SpeedCallback()
        self.add_callback(self.speed)
        self.add_callback(GradientCallback)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # here, since the Trainer's history and earlier callbacks have their copies before our callback would be asked
        super().log({**logs, **self.speed.since_last_time()} if "loss" in logs else logs, start_time)

    @cached_property
    def _parameters(self) -> int:
        return self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """As the Trainer counts them, without walking through all modules at every step: 20 ms of a 7B's 500."""
        return 6 * inputs["input_ids"].numel() * self._parameters

    def report(self, split: str, metrics: dict[str, float]) -> None:
        """Print `metrics`, and keep them in output_dir as `split`_results.json, that of "train" with step_seconds."""
        self.log_metrics(split, metrics)
        steps = {"step_seconds": [round(seconds, 4) for seconds in self.speed.step_seconds]}
        self.save_metrics(split, {**metrics, **steps} if split == "train" else metrics)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter's files; the record follows when everything else in the folder is written."""
        folder = Path(output_dir or self.args.output_dir)
        state_dict = None
        if self.strategy.shards_weights:
            # a gathering that all processes take part in
            state_dict = self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        names = None
        if self.args.should_save:
            names = write_adapter(folder, self.model, self.processing_class, self.extended_config, state_dict)
        if not _internal_call:
            self._write_record(folder, names)

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        # old checkpoints go only after this one is whole
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        written = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        self._write_record(written)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            remove_old_checkpoints(self.args.output_dir, limit, keep=[written, *([Path(best)] if best else [])])

    def _write_record(self, folder: Path, names: list[str] | None = None) -> None:
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seen = {"steps": self.state.global_step, "trained_tokens": self.state.num_input_tokens_seen}
            write_record(folder, {**self.record, **seen}, names)
        self.accelerator.wait_for_everyone()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, summed loss of each row, its number of labels): `token_weighted_loss` puts them together."""
        inputs = self._prepare_inputs(inputs)
        has_label = inputs.pop("shift_labels")[:, :-1] != IGNORE_INDEX
        inputs.pop("labels")
        with self.accelerator.autocast():  # which the wrapped model would bring along
            losses = next_token_losses(self.accelerator.unwrap_model(model), **inputs)
        return None, (losses * has_label).sum(1), has_label.sum(1)


def token_weighted_loss(prediction: EvalPrediction) -> dict[str, float]:
    """`loss` in nats per token over all rows, and its `perplexity`."""
    loss = float(prediction.predictions.sum() / max(prediction.label_ids.sum(), 1))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp overflows a float beyond 709
