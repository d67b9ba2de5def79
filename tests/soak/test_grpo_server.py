"""The program of ``docs/grpo-server.md`` against a real server: TRL's GRPOTrainer in server mode."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.client_environments import OFFLINE, ROOT
from tests.helpers.routers import free_port
from tests.helpers.server_process import serving
from tests.serving.test_trl_client import saved_model

PAGE = ROOT / "docs" / "grpo-server.md"
STEPS = 12

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


def test_rewards_rise_and_the_server_has_the_trainer_s_bits(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert program.count('vllm_mode="server", ') == 1
    program = program.replace('vllm_mode="server", ', f'vllm_mode="server", vllm_group_port={free_port()}, ')
    (tmp_path / "train.py").write_text(program)
    model = saved_model(tmp_path / "tiny")
    with serving(model, "--port", "0", "--enable-admin-endpoints") as server:
        done = subprocess.run(
            [sys.executable, "train.py", str(model), server.url, str(STEPS)], cwd=tmp_path, capture_output=True,
            text=True, env={**OFFLINE, "PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rewards, differences = (
        [float(one) for one in re.findall(rf"'{name}': '?([0-9.e-]+)", done.stdout)]
        for name in ("reward", "sampling/sampling_logp_difference/max")
    )
    print("rewards", rewards, "largest difference of log-probabilities", max(differences))
    assert len(rewards) == len(differences) == STEPS
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.05
    assert max(differences) < 1e-5  # TRL's padded forward sums in another order
