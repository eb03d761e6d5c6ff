"""Records what every kernel gives on a GPU for small fixed inputs: a test vector for the simulator.

python -m bench.gpu_vectors --commit $(git rev-parse --short HEAD) --output bench/results/gpu_vectors.npz

tests/test_gpu_vectors.py repeats the launches in the simulator. Each launch gets the inputs that the GPU's
had, outputs of earlier launches included: no difference is carried on from one kernel to the next.
"""

import argparse
import datetime
import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch

from bench import machine
from vsa_cuda import _kernels
from vsa_cuda.geometry import CubeGrid

Values = dict[str, torch.Tensor]
CUBE = (4, 4, 4)
_MOST_BYTES = 1_200_000
_GATE_FINE = 0.75  # not 1, so that grad_fine is written


@dataclass(frozen=True)
class Step:
    """One function of vsa_cuda._kernels. None in `outputs` is not recorded."""

    function: Callable
    arguments: Callable[[Values], tuple]
    outputs: tuple[str | None, ...]


@dataclass(frozen=True)
class Attention:
    """Forward and backward over random lists, some of them short or empty."""

    name: str
    video_shape: tuple[int, int, int]
    heads: int
    head_dim: int
    dtype: torch.dtype
    topk: int

    def inputs(self) -> Values:
        grid = CubeGrid(self.video_shape, CUBE)
        generator = numpy.random.default_rng(0)
        rows = (1, self.heads, grid.num_cubes)
        tokens = (1, grid.num_tokens, self.heads, self.head_dim)
        names = dict.fromkeys(("query", "key", "value", "grad_out", "gate_coarse"), tokens)
        names |= dict.fromkeys(("coarse", "dq_pooled", "dk_pooled", "dv_pooled"), (*rows, self.head_dim))
        values = {name: _normal(generator, shape, self.dtype) for name, shape in names.items()}
        order = generator.random((*rows, grid.num_cubes)).argsort(-1)[..., : self.topk]
        values["kv_indices"] = torch.from_numpy(numpy.sort(order).astype("int32"))
        values["kv_num_blocks"] = torch.from_numpy(generator.integers(0, self.topk + 1, rows, dtype="int32"))
        return values

    def steps(self) -> list[Step]:
        shape, scale = self.video_shape, self.head_dim**-0.5
        lists = ("kv_num_blocks", "kv_indices")
        grids = (shape, shape, CUBE, CUBE, scale, True)

        def named(*names):
            return lambda values: tuple(values[name] for name in names)

        attended, pooled = named("query", "key", "value"), named("dq_pooled", "dk_pooled", "dv_pooled")
        return [
            Step(
                _kernels.pool,
                lambda values: (*attended(values), shape, CUBE),
                ("query_pooled", "key_pooled", "value_pooled"),
            ),
            Step(
                _kernels.fine_forward,
                lambda values: (
                    *attended(values), *named(*lists)(values), None, None, values["coarse"], None,
                    values["gate_coarse"], _GATE_FINE, 0.0, *grids,
                ),
                ("out", "out_fine", "lse"),
            ),
            Step(
                _kernels.combine_backward,
                lambda values: (
                    *named("grad_out", "out_fine")(values), None, values["coarse"], None,
                    values["gate_coarse"], _GATE_FINE, 0.0, None, shape, CUBE,
                ),
                ("grad_fine", "delta", "grad_coarse", None, "grad_gate_coarse"),
            ),
            Step(
                _kernels.transpose_index,
                lambda values: (*named(*lists)(values), CubeGrid(shape, CUBE).num_cubes),
                ("q_offsets", "q_indices"),
            ),
            Step(
                _kernels.fine_backward,
                lambda values: (
                    values["grad_fine"], *attended(values), *named("lse", "delta", *lists)(values),
                    *named("q_offsets", "q_indices")(values), None, None, *pooled(values), *grids,
                ),
                ("dq", "dk", "dv"),
            ),
        ]  # fmt: skip


@dataclass(frozen=True)
class AllPairs:
    """All pairs of blocks of consecutive tokens: no lists."""

    name: str
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    def draw(self, generator: numpy.random.Generator, *names: str) -> Values:
        shape = (1, self.tokens, self.heads, self.head_dim)
        return {name: _normal(generator, shape, self.dtype) for name in names}

    @property
    def grids(self) -> tuple:
        """Video shapes and cubes of queries and keys, and the scale."""
        shape, cube = (1, 1, self.tokens), (1, 1, 64)
        return shape, shape, cube, cube, self.head_dim**-0.5


class DenseForward(AllPairs):
    """The forward, by CTAs in pairs."""

    def inputs(self) -> Values:
        return self.draw(numpy.random.default_rng(0), "query", "key", "value")

    def steps(self) -> list[Step]:
        def arguments(values):
            inputs = (values[name] for name in ("query", "key", "value"))
            return *inputs, *(None,) * 7, 1.0, 0.0, *self.grids, True

        return [Step(_kernels.fine_forward, arguments, ("out", None, "lse"))]


class FusedBackward(AllPairs):
    """The backward in one pass. No dQ is a sum of more than one part."""

    deterministic = False

    def inputs(self) -> Values:
        generator = numpy.random.default_rng(0)
        rows = (1, self.heads, CubeGrid.linear(self.tokens).num_cubes, 64)
        values = self.draw(generator, "grad_fine", "query", "key", "value")
        values["lse"] = math.log(self.tokens) + 0.1 * _normal(generator, rows, torch.float32)
        values["lse"].view(1, self.heads, -1)[..., self.tokens :] = torch.inf
        values["delta"] = _normal(generator, rows, torch.float32)
        return values

    def steps(self) -> list[Step]:
        def arguments(values):
            inputs = (values[name] for name in ("grad_fine", "query", "key", "value", "lse", "delta"))
            return *inputs, *(None,) * 9, *self.grids, self.deterministic

        return [Step(_kernels.fine_backward, arguments, ("dq", "dk", "dv"))]


class DenseBackward(FusedBackward):
    """In two passes; the query pass at head_dim 64 by CTAs in pairs."""

    deterministic = True


@dataclass(frozen=True)
class Delta:
    """combine_backward without gates and coarse output."""

    name: str
    video_shape: tuple[int, int, int]
    heads: int
    head_dim: int
    dtype: torch.dtype

    def inputs(self) -> Values:
        generator = numpy.random.default_rng(0)
        shape = (1, math.prod(self.video_shape), self.heads, self.head_dim)
        return {name: _normal(generator, shape, self.dtype) for name in ("grad_out", "out_fine")}

    def steps(self) -> list[Step]:
        def arguments(values):
            grads = values["grad_out"], values["out_fine"]
            return *grads, *(None,) * 4, 1.0, 0.0, None, self.video_shape, CUBE

        return [Step(_kernels.combine_backward, arguments, (None, "delta", None, None, None))]


@dataclass(frozen=True)
class Selection:
    """Selection alone. With `ties` every score is exact in fp32, and most are shared by several keys."""

    name: str
    heads: int
    cubes: int
    head_dim: int
    dtype: torch.dtype
    topk: int
    ties: bool
    planner: str = "plan_select_large"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if not self.ties else 0.5

    def inputs(self) -> Values:
        generator = numpy.random.default_rng(0)
        shape = (1, self.heads, self.cubes, self.head_dim)

        def tensor():
            if not self.ties:
                return _normal(generator, shape, self.dtype)
            whole = generator.integers(-2, 3, shape) * (generator.random(shape) < 0.1)
            return torch.from_numpy(whole).to(self.dtype)

        return {"query_pooled": tensor(), "key_pooled": tensor()}

    def steps(self) -> list[Step]:
        def arguments(values):
            return values["query_pooled"], values["key_pooled"], self.topk, self.scale, self.planner

        return [Step(_kernels.select, arguments, ("selected_counts", "selected"))]


BF16, FP16 = torch.bfloat16, torch.float16
# Cubes cut off on two sides; as many along time as one CTA takes at that head_dim, or one less than it takes.
CASES = [
    Attention("d128-bf16", (5, 4, 5), 2, 128, BF16, 3),
    Attention("d128-fp16", (5, 4, 5), 1, 128, FP16, 3),
    Attention("d64-bf16", (9, 4, 3), 2, 64, BF16, 2),
    Attention("d64-fp16", (5, 4, 5), 1, 64, FP16, 3),
    DenseForward("dense-d128-bf16", 130, 1, 128, BF16),
    DenseForward("dense-d128-fp16", 130, 1, 128, FP16),
    *(
        FusedBackward(f"fused-d{head_dim}-{name}", 90, 1, head_dim, dtype)
        for head_dim in (64, 128)
        for name, dtype in (("bf16", BF16), ("fp16", FP16))
    ),
    DenseBackward("dense-backward-d64-bf16", 130, 1, 64, BF16),
    DenseBackward("dense-backward-d64-fp16", 130, 1, 64, FP16),
    *(
        Delta(f"delta-d{head_dim}-{name}", (5, 4, 5), 2, head_dim, dtype)
        for head_dim in (64, 128)
        for name, dtype in (("bf16", BF16), ("fp16", FP16))
    ),
    Selection("select-d64-bf16", 2, 130, 64, BF16, 9, ties=False),
    Selection("select-d64-fp16", 2, 130, 64, FP16, 40, ties=True),
    Selection("select-d128-bf16", 1, 130, 128, BF16, 40, ties=True),
    Selection("select-d128-fp16", 1, 130, 128, FP16, 9, ties=False),
    # So many heads that the kernel with 128 rows a CTA runs.
    *(
        Selection(f"select-wide-d{head_dim}-{name}", 67, 65, head_dim, dtype, 5, ties=True)
        for head_dim in (64, 128)
        for name, dtype in (("bf16", BF16), ("fp16", FP16))
    ),
    # Untied scores as above; one row a warp; a key tile more than there are warpgroups.
    Selection("select-small-d64-bf16", 2, 130, 64, BF16, 9, ties=False, planner="plan_select_small"),
    Selection("select-small-d64-fp16", 1, 520, 64, FP16, 40, ties=True, planner="plan_select_small"),
    Selection("select-small-d128-bf16", 1, 390, 128, BF16, 40, ties=True, planner="plan_select_small"),
    Selection("select-small-d128-fp16", 1, 130, 128, FP16, 9, ties=False, planner="plan_select_small"),
]


def _normal(generator, shape, dtype) -> torch.Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype="float32")).to(dtype)


def run(case, execute: Callable, recorded: Values | None = None) -> Values:
    """Outputs of a case's steps by name. execute(function, *arguments) calls the function somewhere.

    With `recorded`, later steps get those outputs of earlier ones, not their own.
    """
    values, outputs = case.inputs(), {}
    for step in case.steps():
        results = execute(step.function, *step.arguments(values))
        for name, output in zip(step.outputs, results, strict=True):
            if name is not None:
                outputs[name] = output
                values[name] = output if recorded is None else recorded[name]
    return outputs


def execute_on_gpu(function: Callable, *arguments) -> list[torch.Tensor]:
    moved = (x.cuda() if isinstance(x, torch.Tensor) else x for x in arguments)
    return [x.cpu() for x in function(*moved)]


def digest(values: Values) -> str:
    """SHA-256 over names and bytes of tensors."""
    made = hashlib.sha256()
    for name, x in values.items():
        made.update(name.encode() + b"\0" + _array(x).tobytes())
    return made.hexdigest()


def _array(x: torch.Tensor) -> numpy.ndarray:
    """numpy knows no bfloat16: halves are kept as their bits."""
    return (x.view(torch.int16) if x.element_size() == 2 else x).contiguous().numpy()


def save(path: Path, outputs: dict[str, Values], about: dict) -> None:
    """`outputs` by case name; `about` says where they come from, and gets the digests of their inputs."""
    about = about | {"inputs": {case.name: digest(case.inputs()) for case in CASES if case.name in outputs}}
    arrays = {f"{case}/{name}": _array(x) for case, values in outputs.items() for name, x in values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    numpy.savez_compressed(path, about=json.dumps(about), **arrays)


def load(path: Path) -> tuple[dict[str, Values], dict]:
    """(outputs by case name, about) of a file made by `save`."""
    outputs: dict[str, Values] = {}
    dtypes = {case.name: case.dtype for case in CASES}
    with numpy.load(path) as arrays:
        for key in arrays.files:
            if key != "about":
                case, name = key.split("/")
                x = torch.from_numpy(arrays[key])
                outputs.setdefault(case, {})[name] = x.view(dtypes[case]) if x.dtype == torch.int16 else x
        return outputs, json.loads(str(arrays["about"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--commit", help="recorded where the tree has no .git")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    reason = machine.no_gpu_reason()
    if reason is not None:
        print(f"gpu_vectors: no Hopper GPU ({reason}); nothing is recorded.", file=sys.stderr)
        return 2
    about = machine.environment("cuda") | {
        "command": " ".join(["python", "-m", "bench.gpu_vectors", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    about["commit"] = options.commit or about["commit"]
    outputs = {case.name: run(case, execute_on_gpu) for case in CASES}
    save(options.output, outputs, about)
    size = options.output.stat().st_size
    print(json.dumps(about, indent=2))
    print(f"wrote {options.output}: {size} bytes, {len(outputs)} cases")
    if size > _MOST_BYTES:
        print(f"gpu_vectors: expected at most {_MOST_BYTES} bytes", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
