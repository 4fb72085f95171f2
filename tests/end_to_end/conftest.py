"""Fixtures shared by the end-to-end tests."""

import os
from multiprocessing import forkserver

import pytest

from tests.conftest import ROOT
from tests.train_run import Launcher


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> Launcher:
    """train(values): wait for a run; its exit status and output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        launcher = Launcher(tmp_path_factory.mktemp("runs"))
        launcher.context.set_forkserver_preload(["train", "deepspeed", "bitsandbytes", "peft", "pytest"])
        forkserver.ensure_running()
    return launcher
