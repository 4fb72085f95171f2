"""Which checkpoints a run may continue."""

import json

import pytest

from component.distributed.strategy import Strategy
from component.error import UserError
from component.train.resume import check_continuation, distribution

WRITTEN = {"files": {}, "base_model": "x", "rope_type": "linear", "rope_factor": 2}


@pytest.fixture
def written_by(tmp_path):
    """written_by(strategy, samples): a checkpoint's folder; without samples one of an earlier version's."""

    def write(strategy: Strategy, samples: int | None) -> str:
        record = WRITTEN | (distribution(strategy, samples) if samples else {})
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
