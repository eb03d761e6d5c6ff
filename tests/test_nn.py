"""The VideoSparseAttention module inside a transformer block, and the package's information."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vsa_cuda
from inputs import random_tokens
from vsa_cuda import VideoSparseAttention, __main__, _extension, info, video_sparse_attention

SHAPE, TOKENS, HEADS, HEAD_DIM = (3, 5, 6), 90, 2, 64
DIM = HEADS * HEAD_DIM


class Block(nn.Module):
    """Self-attention of a Wan-like block: projections, q and k norms, VSA, output projection, residual."""

    def __init__(self, **kwargs):
        super().__init__()
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(DIM, DIM) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention = VideoSparseAttention(DIM, **kwargs)

    def forward(self, hidden_states, video_shape, **kwargs):
        normed = self.norm(hidden_states)
        q, k, v = self.norm_q(self.to_q(normed)), self.norm_k(self.to_k(normed)), self.to_v(normed)
        q, k, v = (x.unflatten(-1, (HEADS, HEAD_DIM)) for x in (q, k, v))
        out = self.attention(q, k, v, video_shape, hidden_states=normed, **kwargs)
        return hidden_states + self.to_out(out.flatten(2))


def test_state_dict_names_and_zero_initialisation():
    module = VideoSparseAttention(DIM, topk=2)
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == {
        "to_gate_compress.weight": (DIM, DIM),
        "to_gate_compress.bias": (DIM,),
    }
    assert all((x == 0).all() for x in module.parameters())
    assert list(VideoSparseAttention(DIM, topk=2, bias=False).state_dict()) == ["to_gate_compress.weight"]


def test_meta_initialisation():
    module = VideoSparseAttention(DIM, topk=2, device="meta", dtype=torch.bfloat16)
    assert module.to_gate_compress.weight.is_meta
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.fill_(torch.nan)
    module.reset_parameters()
    assert all((x == 0).all() and x.dtype == torch.bfloat16 for x in module.parameters())


def test_untrained_dense_block_equals_dense_attention(seed):
    block = Block(sparsity=0.0)
    hidden = torch.randn(2, TOKENS, DIM)
    normed = block.norm(hidden)
    q, k, v = block.norm_q(block.to_q(normed)), block.norm_k(block.to_k(normed)), block.to_v(normed)
    q, k, v = (x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for x in (q, k, v))
    dense = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block(hidden, SHAPE), hidden + block.to_out(dense))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_gate_is_projected_from_the_hidden_states(layout, seed):
    module = VideoSparseAttention(DIM, topk=2, layout=layout)
    nn.init.normal_(module.to_gate_compress.weight, std=0.1)
    nn.init.normal_(module.to_gate_compress.bias)
    q, k, v = random_tokens(3, TOKENS)
    hidden = torch.randn(1, TOKENS, DIM)
    gate = module.to_gate_compress(hidden).view(1, TOKENS, HEADS, HEAD_DIM)
    wanted = video_sparse_attention(q, k, v, SHAPE, topk=2, gate_coarse=gate)
    if layout == "bhsd":
        q, k, v, wanted = (x.transpose(1, 2) for x in (q, k, v, wanted))
    assert torch.equal(module(q, k, v, SHAPE, hidden_states=hidden), wanted)
    gate = module.project_gate(hidden, HEAD_DIM)
    assert gate.shape == q.shape
    assert torch.equal(module(q, k, v, SHAPE, gate=gate), wanted)


def test_gate_of_some_heads(seed):
    """Sequence parallelism: after the all-to-all a rank holds its heads of every tensor, gate included."""
    module = VideoSparseAttention(DIM, topk=2)
    nn.init.normal_(module.to_gate_compress.weight, std=0.1)
    q, k, v = random_tokens(3, TOKENS)
    gate = module.project_gate(torch.randn(1, TOKENS, DIM), HEAD_DIM)
    wanted = module(q, k, v, SHAPE, gate=gate)
    for head in range(HEADS):
        rank = [x[:, :, head : head + 1] for x in (q, k, v, gate)]
        assert torch.equal(module(*rank[:3], SHAPE, gate=rank[3]), wanted[:, :, head : head + 1])


def test_training_moves_the_gate(seed):
    block = Block(topk=2)
    hidden, target = torch.randn(2, 1, TOKENS, DIM).unbind(0)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    losses = []
    for _ in range(4):
        loss = (block(hidden, SHAPE) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in block.parameters())
    assert (block.attention.to_gate_compress.weight != 0).any()
    assert losses == sorted(losses, reverse=True)


def test_compiled_block_under_autocast_and_schedule(seed):
    torch._dynamo.reset()
    block = Block(topk=4)
    hidden = torch.randn(1, TOKENS, DIM)

    def step(hidden, topk):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block(hidden, SHAPE, topk=topk)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for topk in (None, 3, 2):
        out = compiled(hidden, topk)
        assert torch.equal(out, step(hidden, topk))
        out.square().mean().backward()
    assert block.attention.to_gate_compress.weight.grad.dtype == torch.float32
    torch._dynamo.reset()


def test_call_overrides_the_modules_topk(seed):
    module = VideoSparseAttention(DIM, sparsity=0.5)
    q, k, v = random_tokens(3, TOKENS)
    hidden = torch.randn(1, TOKENS, DIM)
    for arguments, topk in (({}, 2), (dict(topk=3), 3), (dict(sparsity=0.75), 1)):
        _, counts, indices = module(q, k, v, SHAPE, hidden_states=hidden, return_selection=True, **arguments)
        assert indices.shape[-1] == topk and (counts == topk).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "hidden_states, gate: got neither, expected exactly one of the two; pass"),
        (
            dict(hidden_states=torch.zeros(1, TOKENS, DIM), gate=torch.zeros(1, TOKENS, HEADS, HEAD_DIM)),
            "hidden_states, gate: got both, expected exactly one of the two; pass",
        ),
        (
            dict(hidden_states=torch.zeros(1, TOKENS, 64)),
            r"hidden_states: got shape \(1, 90, 64\), expected \[B, S, dim\] with dim 128; pass what",
        ),
        (dict(hidden_states=torch.zeros(1, 80, DIM)), r"gate_coarse: got shape \(1, 80, 2, 64\), expected"),
    ],
)
def test_bad_calls(arguments, message):
    module = VideoSparseAttention(DIM, topk=2)
    with pytest.raises(ValueError, match=message):
        module(*random_tokens(3, TOKENS), SHAPE, **arguments)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(topk=2, sparsity=0.5), "topk, sparsity: got both, expected at most one"),
        (dict(layout="sbhd"), "layout: got 'sbhd', expected"),
    ],
)
def test_bad_modules(kwargs, message):
    with pytest.raises(ValueError, match=message):
        VideoSparseAttention(DIM, **kwargs)


def test_module_without_topk_asks_for_it():
    module = VideoSparseAttention(DIM)
    with pytest.raises(ValueError, match="topk, sparsity: got neither, expected exactly one of the two"):
        module(*random_tokens(3, TOKENS), SHAPE, hidden_states=torch.zeros(1, TOKENS, DIM))


def test_repr():
    assert "dim=128, topk=3, cube=(4, 4, 4), layout='bshd'" in repr(VideoSparseAttention(DIM, topk=3))
    assert "sparsity=0.9" in repr(VideoSparseAttention(DIM, sparsity=0.9))


def test_info_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    facts = info()
    assert list(facts) == ["vsa_cuda", "torch", "device", "extension", "backend", "why"]
    assert facts["backend"] == "reference" and facts["device"] == "cpu"
    assert facts["vsa_cuda"] == vsa_cuda.__version__ and facts["torch"] == torch.__version__


@pytest.mark.parametrize(
    "capability, extension, backend, why",
    [
        ((9, 0), True, "cuda", "sm_90 GPU and compiled extension"),
        ((9, 0), False, "reference", "does not import"),
        ((8, 0), True, "reference", r"\(sm_80\) is not sm_90; CUDA tensors raise"),
    ],
)
def test_info_with_a_gpu(monkeypatch, capability, extension, backend, why):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA X")
    monkeypatch.setattr(_extension, "is_available", lambda: extension)
    monkeypatch.setattr(_extension, "load", lambda: vsa_cuda)
    facts = info()
    assert facts["backend"] == backend
    assert re.search(why, facts["why"])
    assert facts["extension"] == ("missing" if not extension else vsa_cuda.__file__)


def test_command_line(capsys):
    assert __main__.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\S", printed, re.MULTILINE) for name in info())
    with pytest.raises(SystemExit):
        __main__.main(["info", "--nonsense"])


def test_import_needs_neither_the_extension_nor_cuda():
    code = (
        "import sys; sys.modules['vsa_cuda._C'] = None; import vsa_cuda, torch; "
        "assert not torch.cuda.is_initialized(); assert 'vsa_cuda.demo' not in sys.modules; "
        "assert vsa_cuda.info()['extension'] == 'missing'"
    )
    root = Path(vsa_cuda.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=root)
