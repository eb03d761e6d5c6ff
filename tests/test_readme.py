"""README.md: its commands are one line each, and its code runs and tells the truth."""

import re
from pathlib import Path

import pytest
import torch

from vsa_cuda import video_sparse_attention

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def fenced(heading, language):
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", README, re.M | re.S)[1]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.M | re.S)


@pytest.mark.parametrize(("heading", "extra"), [("Run", "demo"), ("Test", "test")])
def test_one_command_of_one_line(heading, extra):
    (block,) = fenced(heading, "sh")
    (command,) = block.splitlines()
    assert command.startswith("python3 -m venv .venv && ")
    assert f'-c constraints.txt ".[{extra}]"' in command


def test_usage_runs(capsys):
    (code,) = fenced("Use", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert "torch.Size([1, 1920, 2, 128])" in capsys.readouterr().out


def test_equivalent_code_is_equivalent(seed):
    (code,) = fenced("The op in PyTorch", "python")
    names = {"torch": torch}
    exec(compile(code, "README.md", "exec"), names)
    video_shape, topk = (4, 8, 12), 3
    q, k, v, gate_coarse, gate_fine = torch.randn(5, 1, 4 * 8 * 12, 1, 64, dtype=torch.float64)
    expected = names["video_sparse_attention_by_hand"](
        *(x[0, :, 0] for x in (q, k, v)), video_shape, topk, gate_coarse[0, :, 0], gate_fine[0, :, 0]
    )
    out = video_sparse_attention(
        q, k, v, video_shape, topk=topk, gate_coarse=gate_coarse, gate_fine=gate_fine
    )
    torch.testing.assert_close(out[0, :, 0], expected, rtol=1e-10, atol=1e-10)
