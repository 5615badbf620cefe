"""Heads spread over processes (``tp_plan="auto"``, `parallelize_module`): all of them keep and drop the same tokens."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.e2e._tensor_parallel import PLANS
from tests.zoo import ZOO

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="a build of torch without torch.distributed"),
]


@pytest.mark.parametrize(
    ("how", "plans"),
    [
        pytest.param("torch", ["shared"], id="torch-shared"),
        pytest.param("torch", ["calibrate", *PLANS], id="torch-all", marks=pytest.mark.matrix),
        # Transformers asks for accelerate here.
        pytest.param("transformers", ["calibrate", *PLANS], id="transformers", marks=pytest.mark.libraries),
    ],
)
def test_two_processes_answer_as_one(tmp_path, how, plans):
    ZOO["llava"].make().save_pretrained(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--module", "tests.e2e._tensor_parallel", str(tmp_path), how, *plans]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr[-6000:]
