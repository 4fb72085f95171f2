"""How is a model trained, resumed and saved? By the Hugging Face Trainer, with three changes.

Checkpoints are adapter folders whose record is written last, so an interrupted run finds its latest complete one.
Evaluation uses full attention and weights all tokens equally, independent of batching.
The processes of a sequence group read the same rows. Each has its part of their tokens, so to the rest of the Trainer,
which sums losses, gradients and numbers of tokens over processes, they are like processes with different rows.
"""

import math
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import EvalPrediction, PretrainedConfig, Trainer, TrainingArguments

from component.card.write import write_card
from component.checkpoint import read_record, remove_old_checkpoints, write_adapter, write_record
from component.data import IGNORE_INDEX
from component.data.skipping import PositionSkipping
from component.distributed.sequence import sequence_group
from component.distributed.strategy import Strategy
from component.error import UserError, first_line
from component.loss import TOKENS_PER_CHUNK, eval_chunk, next_token_losses, use_loss_head
from component.memory.apply import forget_unfinished
from component.train.callback import RoundingCallback, SpeedCallback, Startup
from component.train.failure import GradientGuard, check_loss
from component.train.graph import GraphedSteps
from component.train.optimizer import wait_once
from component.train.zero import GradientCallback


class LongQLoRATrainer(Trainer):
    """The Hugging Face Trainer, writing adapter folders and computing token-weighted perplexity.

    Args:
        extended_config: the config to save in adapter folders.
        record: content of `longqlora.json`; steps and tokens are added on writing.
        strategy: how training is distributed.
        startup: how long earlier stages of this process took.
        cuda_graph: compute micro-batches by a CUDA graph where they allow it.
        skipping_context: tokens whose positions training rows cover by skips; the collator adds what is needed. None:
            no position is skipped.
    """

    eval_dtype: torch.dtype | None = None  # of autocast in evaluation, if a key asks for another than in training

    def __init__(
        self,
        *args,
        extended_config: PretrainedConfig,
        record: dict,
        strategy: Strategy,
        startup: Startup | None = None,
        cuda_graph: bool = False,
        skipping_context: int | None = None,
        **kwargs,
    ):
        self.strategy, self.skipping = strategy, None
        self.expected_time: dict[str, float] = {}  # seconds of a step and hours, for train_results.json
        self.graphs: GraphedSteps | None = None
        super().__init__(*args, compute_metrics=token_weighted_loss, **kwargs)
        self.can_chunk_evaluation = not strategy.shards_weights or use_loss_head(self.model.get_base_model())
        if skipping_context is not None:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self.skipping = PositionSkipping(skipping_context, seed)
        if cuda_graph:
            config = self.model.get_base_model().config
            self.graphs = GraphedSteps(
                self._loss,
                self._trained,
                lambda: getattr(config, "group_size", None),
                self._train_plainly,
                lambda: forget_unfinished(self.model),
            )
        self.extended_config = extended_config
        self.record = record
        self.speed = SpeedCallback(startup)
        self.add_callback(self.speed)
        self.guard = GradientGuard()
        self.add_callback(self.guard)
        self.add_callback(GradientCallback)
        self.add_callback(RoundingCallback)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.strategy == Strategy():  # a launched single process would be wrapped in DDP, and pay for its buckets
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        if self.strategy.sequence_processes > 1:
            # data loaders give the processes of one tensor-parallel group, accelerate's "tp", the same rows
            shape = (self.strategy.data_processes, self.strategy.sequence_processes)
            mesh = init_device_mesh(self.args.device.type, shape, mesh_dim_names=("dp_replicate", "tp"))
            self.accelerator._prepare_device_mesh = lambda: mesh
            self.accelerator.gather_for_metrics = self.gather_function = self._gather_rows

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        wait_once(optimizer)
        return optimizer

    def _gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all sequence groups, each once, without those that only fill up the last batch."""
        shape = (self.strategy.data_processes, self.strategy.sequence_processes, *rows.shape)
        rows = self.accelerator.gather(rows).view(shape)[:, 0].flatten(0, 1)
        state = self.accelerator.gradient_state
        return rows[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else rows

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return super().get_total_train_batch_size(args) // self.strategy.sequence_processes

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # not in a callback: by then the Trainer's history and other callbacks have copied the logs
        super().log({**logs, **self.speed.since_last_log()} if "loss" in logs else logs, start_time)

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.zero_grad = self._forget_gradients
        if self.skipping is not None:
            inputs = self.skipping.apply(inputs, self.state.global_step)
        loss = None
        if self.graphs is not None:
            model.train()
            inputs = self._prepare_inputs(inputs)
            loss = self.graphs.step(inputs, num_items_in_batch)
        if loss is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        # the Trainer reads it here too, but hides what is not finite from the logs
        check_loss(loss, self.state.global_step + 1, inputs["input_ids"], self.processing_class, self.args.output_dir)
        return loss

    @cached_property
    def _trained(self) -> list[nn.Parameter]:
        """To look for these in all modules takes 10 of a 7B's 400 ms a step each time, with the GPU idle."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _forget_gradients(self, set_to_none: bool = True) -> None:
        if self.graphs is not None:
            self.graphs.forget_gradients()
            return
        for parameter in self._trained:
            parameter.grad = None

    def _drop_graph(self) -> None:
        """Free the memory of what was recorded, and of gradients that were applied already."""
        if self.graphs is not None:
            self.graphs.release()
            self.graphs.forget_gradients()

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self._drop_graph()

    def _train_plainly(self, inputs: dict[str, torch.Tensor], items: torch.Tensor) -> torch.Tensor:
        return super().training_step(self.model_wrapped, inputs, items)

    def _loss(self, inputs: dict[str, torch.Tensor], items: torch.Tensor) -> torch.Tensor:
        with self.compute_loss_context_manager():
            return self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=items)

    def _clip_grad_norm(self, model):
        return self.accelerator.clip_grad_norm_(self._trained, self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.guard.norm, self.guard.scaler = norm, self.accelerator.scaler
        return norm

    @cached_property
    def _parameter_count(self) -> int:
        return self.accelerator.unwrap_model(self.model).num_parameters(exclude_embeddings=True)

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """The Trainer's formula without traversing all modules at every step, 20 of a 7B's 500 ms."""
        return 6 * inputs["input_ids"].numel() * self._parameter_count

    def report(self, split: str, metrics: dict[str, float]) -> None:
        """Print `metrics` and save them as `split`_results.json; those of "train" with seconds of steps and before.

        The card has those of "eval" too.
        """
        self.log_metrics(split, metrics)
        steps: dict = {"step_seconds": [round(seconds, 4) for seconds in self.speed.step_seconds]}
        steps |= {"startup_seconds": self.speed.startup.seconds}
        if self.expected_time:
            steps["expected"] = {name: round(value, 4) for name, value in self.expected_time.items()}
        if self.graphs is not None:
            steps["graphed_micro_batches"] = self.graphs.replayed
        self.save_metrics(split, {**metrics, **steps} if split == "train" else metrics)
        if split == "eval":
            self._write_card()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter's files; in checkpoints the record follows once the Trainer's own files are written."""
        folder = Path(output_dir or self.args.output_dir)
        state_dict = None
        if self.strategy.shards_weights:
            # collective: all processes must call it
            state_dict = self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True)
        names = None
        if self.args.should_save:
            names = write_adapter(folder, self.model, self.processing_class, self.extended_config, state_dict)
        if not _internal_call:
            self._write_record(folder, names)
            self._write_card()

    def _save_checkpoint(self, model: nn.Module, trial) -> None:
        # delete old checkpoints only after this one is complete
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
            best = self.state.best_model_checkpoint if self.args.load_best_model_at_end and names else None
            chosen = (read_record(best) or {}) if best else {}  # the adapter in output_dir is that of an earlier step
            write_record(folder, {**self.record, **seen, **{key: chosen.get(key, seen[key]) for key in seen}}, names)
        self.accelerator.wait_for_everyone()

    def _write_card(self) -> None:
        if self.args.should_save:
            write_card(Path(self.args.output_dir))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        # the Trainer would cast the weights themselves, and cannot cast 4-bit ones; `prediction_step` uses autocast
        self._drop_graph()
        names = ("fp16_full_eval", "bf16_full_eval")
        asked = {name: getattr(self.args, name) for name in names}
        self.args.fp16_full_eval = self.args.bf16_full_eval = False
        dtypes = dict(zip(names, (torch.float16, torch.bfloat16), strict=True))
        self.eval_dtype = next((dtypes[name] for name in names if asked[name]), None)
        try:
            # a DataLoader draws its seed from the global generator, which dropout draws from too: without the fork,
            # weights would depend on whether and when they are evaluated
            with torch.random.fork_rng(devices=[]):
                return super().evaluate(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            rows = self.args.per_device_eval_batch_size
            cure = "set per_device_eval_batch_size: 1" if rows > 1 else "shorten the samples of eval_file"
            raise UserError(
                f"eval_file: the GPU is out of memory at per_device_eval_batch_size {rows} ({first_line(error)}); "
                f"{cure}. What was saved before is in {self.args.output_dir}"
            ) from error
        finally:
            self.args.fp16_full_eval, self.args.bf16_full_eval = asked.values()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(None, summed loss per row, labels per row), for `token_weighted_loss`."""
        inputs = self._prepare_inputs(inputs)
        targets, sequence = inputs["shift_labels"], sequence_group()
        base = self.accelerator.unwrap_model(model)
        chunk = eval_chunk(getattr(base.get_base_model(), "loss_chunk", TOKENS_PER_CHUNK), len(targets))
        if not self.can_chunk_evaluation:  # each call is collective; processes have rows of other lengths
            chunk = targets.shape[1]
        wanted = None if self.eval_dtype is None else torch.autocast(self.args.device.type, self.eval_dtype)
        with wanted or self.accelerator.autocast():  # the wrapped model would enable it itself
            # no mask, which would be (B, 1, T, T): padding is on the right, where no real token attends
            positions = {"position_ids": inputs["position_ids"]} if sequence else {}  # else from 0
            losses = next_token_losses(base, inputs["input_ids"], chunk, targets, **positions)
        sums = torch.stack([losses.double().sum(1), (targets != IGNORE_INDEX).sum(1)])  # losses without targets are 0
        if sequence:
            dist.all_reduce(sums, group=sequence.group)
        return None, *sums


def token_weighted_loss(prediction: EvalPrediction) -> dict[str, float]:
    """`loss` in nats per token over all rows, and its `perplexity`."""
    # arrays, or lists of arrays with eval_do_concat_batches: false
    total, count = (
        sum(float(part.sum()) for part in parts) for parts in (prediction.predictions, prediction.label_ids)
    )
    loss = total / max(count, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}  # exp overflows a float beyond 709
