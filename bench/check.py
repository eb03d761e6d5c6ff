"""Correctness before speed: outputs and gradients of sampled cubes against float64.

The rule is DESIGN section 3's: no worse than `factor` times PyTorch's own error in the input dtype, in the
maximum (plus one eps of the largest value) and in the Frobenius norm of each (batch, head). Whole tensors
would take hours at 100k tokens, so a few cubes of a few heads are computed in full; corners are always among
them. tests/test_bench.py holds the float64 side against vsa_cuda.reference.
"""

from dataclasses import dataclass, field

import torch

from bench.patterns import Problem
from vsa_cuda import reference

OWN_FACTOR = 2.0
PEER_FACTOR = 4.0  # a peer need not meet our bound, only compute the same thing
_HEADS, _QUERY_CUBES, _KEY_CUBES = 2, 6, 4


@dataclass
class Verdict:
    """The output closest to its bound, or beyond it; a message for every output beyond it."""

    error: float = 0.0
    tolerance: float = 0.0
    messages: list[str] = field(default_factory=list)
    unchecked: str | None = None  # why nothing was checked

    @property
    def ok(self) -> bool:
        return not self.messages

    def add(self, name: str, actual, exact, baseline, factor: float) -> None:
        """Checks one output of a (batch, head); `baseline` has the output's dtype, `exact` is float64."""
        if torch.isnan(actual).any():
            self._take(name, float("inf"), 0.0, "NaN")
            return
        eps = torch.finfo(baseline.dtype).eps
        actual, baseline = actual.double(), baseline.double()
        error = (actual - exact).abs().max().item()
        bound = factor * (baseline - exact).abs().max().item() + eps * exact.abs().max().item()
        norm = (actual - exact).norm().item()
        norm_bound = factor * (baseline - exact).norm().item() + eps**2 * exact.norm().item()
        if norm > norm_bound:
            self._take(name, norm, norm_bound, "Frobenius error")
        else:
            self._take(name, error, bound, "max error")

    def add_bound(self, name: str, error: float, bound: float) -> None:
        self._take(name, error, bound, "max error")

    def _take(self, name: str, error: float, bound: float, what: str) -> None:
        if not error <= bound:
            self.messages.append(f"{name}: {what} {error:.3e}, bound {bound:.3e}")
        if self.tolerance == 0.0 or error * self.tolerance > self.error * bound:
            self.error, self.tolerance = error, bound


class Expected:
    """One (batch, head) of a problem: in float64, or rounded to the input dtype where PyTorch would round.

    Rows are cubes of real tokens only, in slot order.
    """

    def __init__(self, problem: Problem, batch: int, head: int, exact: bool):
        self.problem, self.exact = problem, exact
        self.dtype = problem.query.dtype
        self.work = torch.float64 if exact else torch.float32
        self.batch, self.head = batch, head
        self.query, self.key, self.value, self.grad = (
            x[batch, :, head].to(self.work)
            for x in (problem.query, problem.key, problem.value, problem.grad_out)
        )
        grid, device = problem.grid, problem.query.device
        self.tokens, self.valid = grid.token_index(device), grid.valid(device)
        self.sizes = grid.cube_sizes(device)
        self.counts = problem.kv_num_blocks[batch, head].tolist()
        self.lists = problem.kv_indices[batch, head].long()
        self._coarse = None

    def round(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.exact else x.to(self.dtype).to(self.work)

    def rows(self, cube: int) -> torch.Tensor:
        """Raster tokens of a cube."""
        return self.tokens[cube][self.valid[cube]]

    def fine(self, cube: int) -> tuple[torch.Tensor, ...]:
        """(keys, P, out, lse) of a cube's rows; keys are the raster tokens of its list."""
        listed = self.lists[cube][: self.counts[cube]]
        keys = self.tokens[listed][self.valid[listed]]
        scores = self.round(self.query[self.rows(cube)] @ self.key[keys].T) * self.problem.scale
        lse = scores.logsumexp(dim=-1)
        p = self.round(torch.softmax(scores, dim=-1))
        return keys, p, self.round(p @ self.value[keys]), lse

    def gate(self, gate: torch.Tensor | float | None, rows: torch.Tensor) -> torch.Tensor | float:
        if gate is None:
            return 1.0
        if not isinstance(gate, torch.Tensor):
            return gate
        return gate.to(self.work) if gate.dim() == 0 else gate[self.batch, rows, self.head].to(self.work)

    def has_coarse(self) -> bool:
        gate = self.problem.gate_coarse
        return isinstance(gate, torch.Tensor) or gate is None or gate != 0.0

    def out(self, cube: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse) of a cube's rows: fine and coarse combined."""
        rows = self.rows(cube)
        *_, fine, lse = self.fine(cube)
        out = fine * self.gate(self.problem.gate_fine, rows)
        if self.has_coarse():
            out = out + self.coarse().out[cube] * self.gate(self.problem.gate_coarse, rows)
        return out.to(torch.float64 if self.exact else self.dtype), lse

    def gradients(self, cube: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(keys, dq, dk, dv) of the fine stage from a cube's rows: dq for them, dk and dv for the keys."""
        rows = self.rows(cube)
        keys, p, out, _ = self.fine(cube)
        grad = self.round(self.grad[rows] * self.gate(self.problem.gate_fine, rows))
        delta = (grad * out).sum(dim=-1, keepdim=True)
        ds = self.round(p * (self.round(grad @ self.value[keys].T) - delta))
        scale = self.problem.scale
        dq, dk = self.round(ds @ self.key[keys]), self.round(ds.T @ self.query[rows])
        return keys, dq * scale, dk * scale, self.round(p.T @ grad)

    def query_gradient(self, cube: int) -> torch.Tensor:
        return self._finish(self.gradients(cube)[1], 0, cube)

    def key_gradients(self, cube: int) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv of a key cube, from every query cube that lists it."""
        mine = self.rows(cube)
        dk, dv = (torch.zeros_like(self.key[mine]) for _ in range(2))
        counts = torch.tensor(self.counts, device=mine.device)
        listed = torch.arange(self.lists.shape[1], device=mine.device) < counts[:, None]
        for chooser in ((self.lists == cube) & listed).any(dim=1).nonzero().flatten().tolist():
            keys, _, dk_part, dv_part = self.gradients(chooser)
            columns = (keys == mine[0]).nonzero()[0, 0]
            dk += dk_part[columns : columns + len(mine)]
            dv += dv_part[columns : columns + len(mine)]
        return self._finish(dk, 1, cube), self._finish(dv, 2, cube)

    def gate_gradient(self, cube: int) -> torch.Tensor:
        """Gradient of a tensor gate of the coarse output."""
        product = self.grad[self.rows(cube)] * self.coarse().out[cube]
        return product.to(torch.float64 if self.exact else self.dtype)

    def _finish(self, grad: torch.Tensor, which: int, cube: int) -> torch.Tensor:
        if self.has_coarse():
            grad = grad + self.coarse().pooled_gradients[which][cube] / self.sizes[cube]
        return grad.to(torch.float64 if self.exact else self.dtype)

    def coarse(self) -> "Coarse":
        if self._coarse is None:
            self._coarse = Coarse(self)
        return self._coarse


class Coarse:
    """The coarse stage of one (batch, head): out [N, D] and the gradients of pooled q, k, v."""

    def __init__(self, expected: Expected):
        problem, grid = expected.problem, expected.problem.grid
        head = slice(expected.head, expected.head + 1)
        batch = slice(expected.batch, expected.batch + 1)
        q, k, v = (
            reference.pool(x[batch, :, head], grid)[0, 0].to(expected.work)
            for x in (problem.query, problem.key, problem.value)
        )
        p = expected.round(torch.softmax(q @ k.T * problem.scale, dim=-1))
        self.scores_bound = q.abs() @ k.abs().T * problem.scale
        self.scores = q @ k.T * problem.scale
        self.out = expected.round(p @ v)
        gate = expected.gate(problem.gate_coarse, slice(None))
        grad = torch.zeros_like(q).index_add_(0, grid.cube_of_token(q.device), expected.grad * gate)
        delta = (grad * self.out).sum(dim=-1, keepdim=True)
        grad = expected.round(grad)
        ds = expected.round(p * (expected.round(grad @ v.T) - delta))
        self.pooled_gradients = (ds @ k * problem.scale, ds.T @ q * problem.scale, p.T @ grad)


def check(
    problem: Problem,
    out: torch.Tensor | None,
    gradients: tuple[torch.Tensor, ...] | None = None,
    lse: torch.Tensor | None = None,
    *,
    factor: float = OWN_FACTOR,
    key_gradients: bool = True,
    selection: bool = False,
) -> Verdict:
    """Checks what a backend computed for `problem`, whose lists it used.

    Args:
        out, gradients: [B, S, H, D]; dq, dk, dv and that of a coarse gate tensor. None is not checked.
        lse: [B, H, S] or None.
        key_gradients: check dk and dv too, from every query cube that lists a sampled key cube.
        selection: check that the lists are what the coarse stage must select.
    """
    verdict = Verdict()
    generator = torch.Generator().manual_seed(problem.seed)
    blocks = problem.grid.num_cubes
    for batch, head in _heads(problem, generator):
        exact, baseline = (Expected(problem, batch, head, flag) for flag in (True, False))
        query_cubes = _sample(blocks, _QUERY_CUBES, generator)
        place = f"batch {batch} head {head}"
        rows = torch.cat([exact.rows(cube) for cube in query_cubes])
        if selection:
            check_selection(verdict, exact, query_cubes, place)
        if out is not None:
            pairs = [(exact.out(cube), baseline.out(cube)[0]) for cube in query_cubes]
            expected = torch.cat([pair[0][0] for pair in pairs])
            verdict.add(f"out, {place}", out[batch, rows, head], expected,
                        torch.cat([pair[1] for pair in pairs]), factor)  # fmt: skip
            if lse is not None:
                _check_lse(verdict, lse[batch, head, rows], torch.cat([pair[0][1] for pair in pairs]), place)
        if gradients is None:
            continue
        dq, dk, dv, *gate_gradients = gradients
        pair = (torch.cat([side.query_gradient(cube) for cube in query_cubes]) for side in (exact, baseline))
        verdict.add(f"dq, {place}", dq[batch, rows, head], *pair, factor)
        if gate_gradients and isinstance(problem.gate_coarse, torch.Tensor):
            pair = (
                torch.cat([side.gate_gradient(cube) for cube in query_cubes]) for side in (exact, baseline)
            )
            verdict.add(f"d gate_coarse, {place}", gate_gradients[0][batch, rows, head], *pair, factor)
        if key_gradients:
            # Together: a cube at a corner may hold one token, whose errors say little.
            cubes = _sample(blocks, _KEY_CUBES, generator)
            rows = torch.cat([exact.rows(cube) for cube in cubes])
            pairs = [_key_gradients(side, cubes) for side in (exact, baseline)]
            for name, actual, *pair in zip(("dk", "dv"), (dk, dv), *pairs, strict=True):
                verdict.add(f"{name}, {place}", actual[batch, rows, head], *pair, factor)
    return verdict


def _key_gradients(side: Expected, cubes: list[int]) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.cat(parts) for parts in zip(*(side.key_gradients(cube) for cube in cubes), strict=True)
    )


def _heads(problem: Problem, generator: torch.Generator) -> list[tuple[int, int]]:
    batch, heads = problem.query.shape[0], problem.query.shape[2]
    picked = _sample(batch * heads, _HEADS, generator)
    return [divmod(index, heads) for index in picked]


def _sample(count: int, number: int, generator: torch.Generator) -> list[int]:
    """First, last and random ones."""
    picked = torch.randperm(count, generator=generator)[: max(0, number - 2)].tolist()
    return sorted({0, count - 1, *picked})


def _check_lse(verdict: Verdict, actual: torch.Tensor, exact: torch.Tensor, place: str) -> None:
    excess = (actual.double() - exact).abs() - (1e-4 + 1e-5 * exact.abs())
    if not bool((excess <= 0).all()):
        verdict.messages.append(f"lse, {place}: {excess.max().item():.3e} beyond 1e-4 + 1e-5 |reference|")


def check_selection(verdict: Verdict, exact: Expected, cubes: list[int], place: str) -> None:
    """Exactly topk ascending blocks, each scored as the k-th at least, up to rounding of the means."""
    coarse, topk = exact.coarse(), exact.problem.topk
    eps = torch.finfo(exact.dtype).eps
    for cube in cubes:
        listed = exact.lists[cube][: exact.counts[cube]]
        in_range = bool(((listed >= 0) & (listed < len(coarse.out))).all())
        ascending = in_range and bool((listed[1:] > listed[:-1]).all())
        if exact.counts[cube] != topk or not ascending:
            verdict.messages.append(f"selection, {place} cube {cube}: not {topk} ascending blocks")
            continue
        scores = coarse.scores[cube]
        kth = scores.topk(topk).values[-1]
        missing = kth - scores[listed] - 4 * eps * coarse.scores_bound[cube].max()
        if bool((missing > 0).any()):
            excess = missing.max().item()
            verdict.messages.append(f"selection, {place} cube {cube}: a block {excess:.3e} too low")
