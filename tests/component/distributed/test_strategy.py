"""The training strategy, from DeepSpeed's configuration and the number of processes."""

import json

import pytest

from component.distributed.strategy import Strategy, training_strategy

S2, S3 = {"zero_optimization": {"stage": 2}}, {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize(
    ("config", "processes", "expected", "text"),
    [
        (None, 1, Strategy(1, None, False), "one process"),
        (None, 4, Strategy(4, None, False), "DDP"),
        ({}, 2, Strategy(2, None, False), "DDP"),
        ({"train_batch_size": "auto"}, 2, Strategy(2, 0, False), "ZeRO-0"),
        ({"zero_optimization": {"stage": 1}}, 2, Strategy(2, 1, False), "ZeRO-1"),
        (S2, 1, Strategy(1, 2, False), "ZeRO-2"),
        (S3, 8, Strategy(8, 3, False), "ZeRO-3"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            1,
            Strategy(1, 2, True),
            "ZeRO-2",
        ),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, 1, Strategy(1, 2), "ZeRO-2"),
    ],
)
def test_training_strategy(config, processes, expected, text, tmp_path):
    found = training_strategy(config, processes)
    assert found == expected
    assert str(found) == text
    if config:
        file = tmp_path / "deepspeed.json"
        file.write_text(json.dumps(config))
        assert training_strategy(str(file), processes) == expected


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        (Strategy(), "one process"),
        (Strategy(4), "DDP, 4 processes: 4 data parallel"),
        (
            Strategy(4, 2, sequence_processes=4),
            "ZeRO-2, 4 processes: each row split over 4, at most 251 tokens on each, 1 data parallel",
        ),
        (
            Strategy(8, 1, sequence_processes=2),
            "ZeRO-1, 8 processes: each row split over 2, at most 501 tokens on each, 4 data parallel",
        ),
    ],
)
def test_description(strategy, text):
    assert strategy.describe(1001) == text


def test_only_zero_3_shards_weights():
    stages = [None, 0, 1, 2, 3]
    assert [Strategy(2, stage).shards_weights for stage in stages] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("file", "stage", "is_offloaded"),
    [
        ("deepspeed_config_s2.json", 2, True),
        ("deepspeed_config_s2_no_offload.json", 2, False),
        ("deepspeed_config_s3.json", 3, False),
    ],
)
def test_the_shipped_files(pytestconfig, file, stage, is_offloaded):
    path = pytestconfig.rootpath / "train_args/deepspeed" / file
    assert training_strategy(str(path)) == Strategy(1, stage, is_offloaded)
