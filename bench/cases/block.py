"""A transformer block shaped like Wan 2.1's, with random weights: attention, rest, total.

Self-attention with RMS norm over all heads of q and k and 3-D RoPE, cross-attention to text, a GELU MLP, all
three modulated as in Wan; no weights are loaded. With VSA the block also projects the coarse gate.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from bench.backends import Backend, Unsupported
from bench.machine import gpu_state
from bench.models import MODELS, Model
from bench.patterns import Problem, make_problem
from bench.rows import Row
from bench.runner import Runner, against_dense, states, times
from bench.shapes import Shape
from vsa_cuda.demo.features import rope_angles

TEXT_TOKENS = 512
_EPS = 1e-6


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Block(nn.Module):
    """x [B, S, dim], text [B, L, dim] -> like x. `attend` takes q, k, v, gate [B, S, heads, head_dim]."""

    def __init__(self, model: Model, attend: Attend, gated: bool, device, dtype):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        dim = model.dim
        self.heads, self.attend, self.gated = model.shape.heads, attend, gated
        self.modulation = nn.Parameter(torch.randn(6, dim, **factory) * dim**-0.5)
        self.to_qkv = nn.Linear(dim, 3 * dim, **factory)
        self.to_out = nn.Linear(dim, dim, **factory)
        self.to_gate = nn.Linear(dim, dim, **factory) if gated else None
        self.norms = nn.ModuleList(nn.RMSNorm(dim, _EPS, **factory) for _ in range(4))  # q, k; cross q, k
        self.cross_norm = nn.LayerNorm(dim, _EPS, **factory)
        self.cross_q = nn.Linear(dim, dim, **factory)
        self.cross_kv = nn.Linear(dim, 2 * dim, **factory)
        self.cross_out = nn.Linear(dim, dim, **factory)
        self.mlp = nn.Sequential(
            nn.Linear(dim, model.mlp_dim, **factory),
            nn.GELU("tanh"),
            nn.Linear(model.mlp_dim, dim, **factory),
        )
        angles = rope_angles(model.shape.grid.video_shape, model.shape.head_dim, device)
        self.register_buffer("rotation", torch.polar(torch.ones_like(angles), angles)[:, None])

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation
        x = x + gate * self.self_attention(_norm(x) * (1 + scale) + shift)
        x = x + self.cross_attention(self.cross_norm(x), text)
        return x + mlp_gate * self.mlp(_norm(x) * (1 + mlp_scale) + mlp_shift)

    def self_attention(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.to_qkv(x).chunk(3, dim=-1)
        query, key = (self.rotate(norm(y)) for norm, y in zip(self.norms, (query, key), strict=False))
        gate = self.split(self.to_gate(x)) if self.gated else None
        return self.to_out(self.attend(query, key, self.split(value), gate).flatten(2))

    def cross_attention(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        key, value = self.cross_kv(text).chunk(2, dim=-1)
        query, key = self.norms[2](self.cross_q(x)), self.norms[3](key)
        heads = (self.split(y).transpose(1, 2) for y in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(*heads)
        return self.cross_out(out.transpose(1, 2).flatten(2))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(self.split(x).float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.rotation).flatten(-2).to(x.dtype)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], eps=_EPS)


class _DenseFa3(torch.autograd.Function):
    """The library's forward and backward on [B, S, H, D]."""

    @staticmethod
    def forward(ctx, query, key, value):
        ops, scale = torch.ops.flash_attn_3, query.shape[-1] ** -0.5
        out, lse = ops.fwd(query, key, value, softmax_scale=scale, is_causal=False, num_splits=1)[:2]
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))
        torch.ops.flash_attn_3.bwd(grad.contiguous(), query, key, value, out, lse, dq=dq, dk=dk, dv=dv,
                                   softmax_scale=query.shape[-1] ** -0.5, is_causal=False)  # fmt: skip
        return dq, dk, dv


def attention_of(backend: Backend, shape: Shape) -> tuple[Attend, bool]:
    """(attention of a backend, whether it takes the coarse gate)."""
    if backend.name == "vsa_cuda":
        import vsa_cuda

        grid, topk = shape.grid, shape.resolved_topk

        def sparse(query, key, value, gate):
            return vsa_cuda.video_sparse_attention(
                query, key, value, grid.video_shape, cube=grid.cube, topk=topk, gate_coarse=gate
            )

        return sparse, True
    if backend.name == "fa3":
        return lambda query, key, value, gate: _DenseFa3.apply(query, key, value), False
    if backend.name == "torch":

        def dense(query, key, value, gate):
            heads = (x.transpose(1, 2) for x in (query, key, value))
            return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)

        return dense, False
    raise Unsupported(f"{backend.name} is not part of the block case")


def measure_block(
    runner: Runner, name: str, direction: str, *, sparsity: float | None = None, seed: int = 0
) -> list[Row]:
    """Times a block and its attention alone; the rest is the difference. The attention is checked first.

    Rows: op "block" (total) and "block_attention". Attention alone runs on the q, k, v of random inputs.
    """
    model = MODELS[name]
    shape = model.shape.keep(sparsity=sparsity)
    problem = make_problem(shape, "random", seed=seed, device=runner.device, with_lists=False)
    gate = torch.randn_like(problem.query) * 0.1
    problem.gate_coarse, problem.gate_fine = gate, 1.0
    calls, backends = {}, {}
    for backend in runner.backends:
        try:
            attend, gated = attention_of(backend, shape)
        except Unsupported:
            continue
        if not runner.verify_attention(backend, problem, direction):
            continue
        torch.manual_seed(seed)
        block = Block(model, attend, gated, runner.device, problem.query.dtype)
        calls |= _block_calls(backend.name, block, attend, problem, direction)
        backends[backend.name] = backend
    before = gpu_state(runner.device)
    timings = runner.time(calls)
    machine = states(before, gpu_state(runner.device))
    rows = []
    for op in ("block", "block_attention"):
        timed = [
            runner.row(
                backend, op=op, direction=direction, status="ok", gates="coarse tensor, fine 1.0",
                note=_note(model, op, timings[f"{op} {backend.name}"].note),
                **runner.describe(problem, backend) | {"case": name, "pattern": "random"},
                **times(timings[f"{op} {backend.name}"]), **machine,
            )
            for backend in backends.values()
        ]  # fmt: skip
        against_dense(timed)
        rows += timed
    return runner.record(rows)


def _note(model: Model, op: str, note: str | None) -> str:
    size = f"{model.source}: dim {model.dim}, MLP {model.mlp_dim}, {TEXT_TOKENS} text tokens, random weights"
    return "; ".join(filter(None, [size if op == "block" else None, note])) or None


def _block_calls(
    name: str, block: Block, attend: Attend, problem: Problem, direction: str
) -> dict[str, Callable]:
    backward = direction == "fwd+bwd"
    shape, dtype = problem.shape, problem.query.dtype
    device, dim = problem.query.device, problem.shape.heads * problem.shape.head_dim
    x = torch.randn(shape.batch, shape.num_tokens, dim, device=device, dtype=dtype, requires_grad=backward)
    text = torch.randn(shape.batch, TEXT_TOKENS, dim, device=device, dtype=dtype)
    heads = [y.detach().requires_grad_(backward) for y in (problem.query, problem.key, problem.value)]
    gate = problem.gate_coarse.detach().requires_grad_(backward) if block.gated else None
    leaves = [*heads, *([gate] if gate is not None else [])]
    parameters = [x, *block.parameters()]

    def whole():
        if not backward:
            with torch.no_grad():
                return block(x, text)
        return torch.autograd.grad(block(x, text), parameters, problem.grad_out.flatten(2))

    def attention():
        if not backward:
            return attend(*heads, gate)
        return torch.autograd.grad(attend(*heads, gate), leaves, problem.grad_out)

    return {f"block {name}": whole, f"block_attention {name}": attention}


@dataclass(frozen=True)
class Step:
    """Block times of dense and sparse attention, and what they extrapolate to."""

    dense_ms: float
    sparse_ms: float

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.sparse_ms


def measured_step(rows: list[Row], name: str, direction: str) -> Step | None:
    """The newest dense and sparse block of one run in `rows`, or None where either is missing."""
    wanted = ("block", name, direction, "ok")
    blocks = [row for row in rows if (row.op, row.case, row.direction, row.status) == wanted]
    for date in sorted({row.date for row in blocks}, reverse=True):
        found = {row.backend: row.ms_median for row in blocks if row.date == date}
        if "fa3" in found and "vsa_cuda" in found:
            return Step(found["fa3"], found["vsa_cuda"])
    return None
