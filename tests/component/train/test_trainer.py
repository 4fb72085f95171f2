"""Token-weighted loss and perplexity, of rows and of all of them."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import EvalPrediction, TrainingArguments

from component.adapter import add_adapter
from component.data import IGNORE_INDEX
from component.data.collator import RightPadCollator
from component.distributed.strategy import Strategy
from component.train.callback import FullAttentionCallback
from component.train.trainer import LongQLoRATrainer, token_weighted_loss
from tests.component.train.test_graph import Again
from tests.reference.plain_path import tiny_model, under_plan


def test_tokens_have_equal_weight():
    """10 nats over 10 tokens and 30 over 2: 40 / 12 nats per token, not (1 + 15) / 2."""
    found = token_weighted_loss(
        EvalPrediction(predictions=torch.tensor([10.0, 30.0]), label_ids=torch.tensor([10, 2]))
    )
    assert found == pytest.approx({"loss": 40 / 12, "perplexity": math.exp(40 / 12)})


def test_a_single_token():
    found = token_weighted_loss(EvalPrediction(predictions=torch.tensor([3.0]), label_ids=torch.tensor([1])))
    assert found == pytest.approx({"loss": 3.0, "perplexity": math.exp(3.0)})


def test_perplexity_does_not_overflow():
    found = token_weighted_loss(EvalPrediction(predictions=torch.tensor([1e6]), label_ids=torch.tensor([10])))
    assert found["loss"] == pytest.approx(1e5)
    assert found["perplexity"] > 1e300
    empty = token_weighted_loss(EvalPrediction(predictions=torch.tensor([0.0]), label_ids=torch.tensor([0])))
    assert empty == {"loss": 0.0, "perplexity": 1.0}


@pytest.fixture
def trainer(tiny_llama, tmp_path) -> LongQLoRATrainer:
    model = add_adapter(tiny_llama, rank=2, alpha=4, dropout=0.0)
    return LongQLoRATrainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        extended_config=tiny_llama.config,
        record={},
        strategy=Strategy(),
    )


def test_the_optimizer_does_not_wait_for_the_gpu(trainer, monkeypatch):
    waits = []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", waits.append)
    trainer.args.optim = "adamw_8bit"
    optimizer = trainer.create_optimizer()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert optimizer.state
    assert not waits


def test_an_evaluated_row_has_its_loss_and_tokens(trainer):
    ids = torch.arange(2, 35).view(3, 11)
    targets = torch.cat([ids[:, 1:], torch.full((3, 1), IGNORE_INDEX)], dim=1)
    targets[1, 4:] = IGNORE_INDEX
    targets[2, :3] = IGNORE_INDEX
    loss, sums, counts = trainer.prediction_step(trainer.model, {"input_ids": ids, "shift_labels": targets}, True)
    assert loss is None
    assert counts.tolist() == [10, 4, 7]
    trainer.model.eval()
    for row in range(3):
        with torch.no_grad():
            logits = trainer.model(input_ids=ids[row : row + 1]).logits[0]
        expected = F.cross_entropy(logits, targets[row], ignore_index=IGNORE_INDEX, reduction="sum")
        assert sums[row].item() == pytest.approx(expected.item(), rel=1e-6)


def test_operations_of_a_batch_are_counted_without_embeddings(trainer):
    ids = torch.zeros(3, 11, dtype=torch.long)
    counts = {name: weight.numel() for name, weight in trainer.model.named_parameters() if "embed_tokens" not in name}
    assert trainer.floating_point_ops({"input_ids": ids}) == 6 * 33 * sum(counts.values())


def rows(count: int, tokens: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(3, 96, (count, tokens), generator=generator).tolist()
    return [{"input_ids": row, "labels": [*[IGNORE_INDEX] * (at % 7), *row[at % 7 :]]} for at, row in enumerate(ids)]


@pytest.mark.parametrize(
    ("values", "ratio", "context"),
    [
        ({"gradient_accumulation_steps": 2}, 0.0, None),
        ({"gradient_accumulation_steps": 1, "eval_strategy": "steps", "eval_steps": 5}, 0.0, None),
        ({"gradient_accumulation_steps": 2, "weight_decay": 0.1}, 0.5, 64),  # PoSE, and full attention at the end
    ],
    ids=["accumulation", "evaluation", "skips"],
)
def test_training_by_a_graph(values, ratio, context, tmp_path, monkeypatch):
    """Imitated on the CPU (tests/component/train/test_graph.py): the same weights as without, to the last bit."""
    monkeypatch.setattr("component.train.graph.Recording", Again)
    monkeypatch.setattr(LongQLoRATrainer, "_write_card", lambda _: None)
    found = {}
    for cuda_graph in (False, True):
        model = under_plan(tiny_model(), keep_layers=1)
        common = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "remove_unused_columns": False}
        common |= {"per_device_train_batch_size": 1, "learning_rate": 1e-2, "max_steps": 14, "max_grad_norm": 0.5}
        trainer = LongQLoRATrainer(
            model=model,
            args=TrainingArguments(output_dir=str(tmp_path), **common | values),
            train_dataset=rows(40),
            eval_dataset=rows(2) if "eval_steps" in values else None,
            data_collator=RightPadCollator(0, with_rows=context is not None),
            callbacks=[FullAttentionCallback(ratio)] if ratio else None,
            extended_config=model.get_base_model().config,
            record={},
            strategy=Strategy(),
            cuda_graph=cuda_graph,
            skipping_context=context,
        )
        trainer.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found[cuda_graph] = torch.cat([parameter.detach().flatten() for parameter in trained])
        assert all(parameter.grad is None for parameter in trained), "nothing is held after training"
    assert torch.equal(found[True], found[False])
    assert trainer.graphs.replayed >= 6
