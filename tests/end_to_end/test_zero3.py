"""Training under ZeRO-3 with a memory plan, against one process without DeepSpeed with the same YAML.

SGD, as in test_sequence_parallel.py. Slow, since DeepSpeed compiles an operator for minutes the first time.
"""

import pytest

from tests.end_to_end.test_sequence_parallel import assert_same_run
from tests.end_to_end.test_sequence_parallel import base_with as base_with  # fixtures
from tests.end_to_end.test_sequence_parallel import basic as basic
from tests.train_run import finish

pytestmark = pytest.mark.slow
RECOMPUTED = {"keep_layers": 0, "keep_attention_layers": 0, "keep_attention_output": True, "offload_activations": True}
CASES = {
    "kept": (2, {"keep_layers": 2}),
    "recomputed": (4, RECOMPUTED),
    "tiles": (2, {"keep_layers": 1, "keep_attention_layers": 1, "mlp_tile_tokens": 13, "loss_chunk_tokens": 11}),
    "4-bit base": (4, {"load_in_4bit": True}),
    "4-bit base, recomputed": (2, {"load_in_4bit": True, **RECOMPUTED, "mlp_tile_tokens": 13}),
    "embeddings and norms": (2, {"train_embedding": True, "train_norm": True}),
    "full attention": (2, {"use_shift_short_attention": False}),
    "Hugging Face's layers": (2, {"memory_plan": False, "gradient_checkpointing": True}),
    "packed": (2, {"packing": True, "load_in_4bit": True}),
    "gradients of activations in FP8": (2, {"frozen_matmul": "fp8_backward", "load_in_4bit": True, **RECOMPUTED}),
    "in FP8, 16-bit base": (2, {"frozen_matmul": "fp8"}),
    "rows split": (2, {"sequence_parallel_size": 2, **RECOMPUTED}),
    "rows split over 2 of 4": (4, {"sequence_parallel_size": 2, "load_in_4bit": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_zero_3_equals_one_process(train, basic, tmp_path, case):
    processes, changes = CASES[case]
    values = {**basic, "per_device_train_batch_size": 1, **changes}
    parts = values.pop("sequence_parallel_size", 1)
    one = {**values, "gradient_accumulation_steps": 4, "output_dir": str(tmp_path / "whole")}
    finish(train(one))
    split = {**values, "deepspeed": "./train_args/deepspeed/deepspeed_config_s3.json", "sequence_parallel_size": parts}
    split |= {"gradient_accumulation_steps": 4 * parts // processes, "output_dir": str(tmp_path / "split")}
    printed = finish(train(split, processes=processes))
    assert "ZeRO-3" in printed
    assert ("no plan" in printed) == (changes.get("memory_plan") is False)
    # numbers in the middle between two of FP8 may be rounded up in one and down in the other
    assert_same_run(tmp_path / "split", tmp_path / "whole", 1e-3 if "frozen_matmul" in changes else 1e-5)
