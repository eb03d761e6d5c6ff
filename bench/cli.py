"""The command line of `python -m bench`."""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from bench import backends, floors, flops, shapes
from bench.cases import block, session
from bench.cases.coarse import measure_coarse
from bench.machine import ROOT, no_gpu_reason
from bench.patterns import PATTERNS, Problem, VideoSource, clip_tokens, make_problem
from bench.report import block_table, make_console, number, print_backends, rows_table, speedup_table
from bench.rows import PASSES, Row, read_json
from bench.runner import Options, Runner

_PEERS = ROOT / ".peers"
_TOKENS = ROOT / ".cache" / "video_tokens.pt"
NO_GPU = 2
_PAPER_REDUCTION, _PAPER_CUT = 2.53, 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Times VSA against FlashAttention-3 and others. "
        "Exit codes: 1 when a case fails its check, 2 without a Hopper GPU.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = _run_options()
    add = commands.add_parser
    add("fine", parents=[run, _shape_options()], help="fine stage over given lists")
    whole = add(
        "op", parents=[run, _shape_options()], help="whole op, and the fine stage alone on its selection"
    )
    whole.add_argument("--gates", choices=("none", "off", "tensor"), default="none",
                       help="coarse gate: none is 1.0, off is 0.0")  # fmt: skip
    add("coarse", parents=[run, _shape_options()], help="the kernels around the fine stage, one at a time")
    add("roofline", parents=[run], help="matrix product, copy, L2 gather, fp32 reduction")
    wan = add("block", parents=[run], help="a transformer block with random weights")
    wan.add_argument("--models", default="wan-1.3b,wan-14b", help=f"of {', '.join(block.MODELS)}")
    wan.add_argument("--passes", type=_passes(("fwd", "fwd+bwd")), default=("fwd", "fwd+bwd"))
    wan.add_argument("--sparsity", type=float, help="default: the model's")
    speed = add(
        "speedup", parents=[run, _shape_options()], help="attention against dense over shapes and sparsities"
    )
    speed.set_defaults(shape="wan", passes=("fwd", "fwd+bwd"), sparsity=[0.8, 0.875, 0.9, 0.95])
    paper = add("flops", help="the paper's accounting of training FLOPs")
    _flops_options(paper)
    plot = add("plot", help="draw rows of earlier runs")
    plot.add_argument("files", nargs="+", type=Path)
    plot.add_argument("--output", type=Path, default=Path("bench.png"))
    one = add("session", parents=[run], help="everything the floors tables need, in one go")
    one.add_argument("--seconds", type=float, default=530.0)
    one.add_argument("--cases", default=",".join(case.name for case in session.CASES), help="comma-separated")
    for name in ("--worker-progress", "--session-command", "--session-date"):
        one.add_argument(name, type=Path if name == "--worker-progress" else str, help=argparse.SUPPRESS)
    tokens = add("tokens", help="save the demo clip's tokens for a machine without network or PyAV")
    tokens.add_argument("--grid", default="21x45x80")
    tokens.add_argument("--clip", help="default: the demo's")
    tokens.add_argument("--output", type=Path, default=_TOKENS)
    readme = add("readme", help="check README's figures against bench/results, or write its tables")
    readme.add_argument("--write", action="store_true")
    add("shapes", help="list the named shapes")
    add("floors", help="floors and aims beside rows of earlier runs").add_argument(
        "files", nargs="+", type=Path
    )
    return parser


def _run_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    add("--cpu", action="store_true", help="run the CPU reference at a small shape; its times mean nothing")
    add("--backends", default=",".join(backends.NAMES), help="comma-separated")
    add("--fa3-library", type=Path, metavar="FILE", help="a library that registers torch.ops.flash_attn_3")
    add("--peers", type=Path, default=_PEERS, metavar="DIR", help="made by get_peers.sh (default .peers)")
    add("--l2", choices=("warm", "cold"), default="warm", help="state of L2 before each timed call")
    add("--budget", type=float, default=3.0, metavar="SECONDS", help="of timing a case")
    add("--no-graphs", action="store_true", help="launch from Python instead of CUDA graphs")
    add("--json", type=Path, metavar="FILE", help="append rows")
    add("--csv", type=Path, metavar="FILE", help="append rows")
    add("--plot", type=Path, metavar="PNG", help="draw this run's rows")
    add("--commit", help="recorded where the tree has no .git")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    add("--deterministic", action="store_true", help="of this package's backward")
    add("--no-roofline", action="store_true", help="leave out the ceilings")
    add("--clip", help="video file or clip name for pattern video")
    add(
        "--video-tokens", type=Path, metavar="FILE", help="made by `python -m bench tokens` (default: .cache)"
    )
    return options


def _shape_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    add("--shape", help="names, grids such as 21x45x80 or token counts, comma-separated; see `shapes`")
    add("--pattern", choices=PATTERNS, default="random")
    add("--heads", type=int, default=24, help="of grids and token counts")
    add("--head-dim", type=int, choices=(64, 128), default=128, help="likewise")
    add("--batch", type=int, default=1, help="likewise")
    kept = options.add_mutually_exclusive_group()
    kept.add_argument("--topk", type=_list_of(int), metavar="K,...", help="default: the shape's")
    kept.add_argument("--sparsity", type=_list_of(float), metavar="X,...", help="default: the shape's")
    add("--passes", type=_passes(PASSES), default=("fwd", "bwd"), help="comma-separated: fwd, bwd, fwd+bwd")
    return options


def _flops_options(parser: argparse.ArgumentParser) -> None:
    default = flops.TrainingFlops()
    add = parser.add_argument
    add("--params", type=float, default=default.params)
    add("--dim", type=int, default=default.dim)
    add("--layers", type=int, default=default.layers)
    add("--tokens", type=int, default=default.tokens)
    add("--topk", type=int, default=default.topk)
    add("--gates", type=int, default=0, metavar="N", help="gate projections a layer beyond --params")
    add("--rows", nargs="*", type=Path, help="result files (default bench/results/*.json)")


def _list_of(kind: type):
    def parse(text: str) -> list:
        return [kind(word) for word in text.split(",")]

    return parse


def _passes(known: tuple[str, ...]):
    def parse(text: str) -> tuple[str, ...]:
        passes = tuple(text.split(","))
        if unknown := set(passes) - set(known):
            raise argparse.ArgumentTypeError(f"got {', '.join(sorted(unknown))}, expected {', '.join(known)}")
        return passes

    return parse


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    console = make_console()
    try:
        if args.command in _OFFLINE:
            return _OFFLINE[args.command](args, console)
        return _measure(args, console)
    except shapes.UsageError as error:
        parser.error(str(error))


def _measure(args: argparse.Namespace, console: Console) -> int:
    reason = no_gpu_reason()
    if reason is not None and not args.cpu:
        print(
            f"bench: no Hopper GPU ({reason}); nothing is measured. --cpu runs the reference.",
            file=sys.stderr,
        )
        return NO_GPU
    if args.cpu and args.command in ("roofline", "session"):
        raise shapes.UsageError(
            f"--cpu: got {args.command}, which measures a GPU; use it with fine, op, coarse or block"
        )
    device = torch.device("cpu" if args.cpu else "cuda")
    if args.command == "session":
        args.json = args.json or ROOT / "bench" / "results" / "session.json"
        if args.worker_progress is None:
            return _supervise(args, console)
    runner = Runner(_options(args, device), _backends(args, console), console)
    if device.type == "cpu":
        return _finish(args, runner)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # CUDA graphs cannot be captured on the default stream.
    with torch.cuda.stream(torch.cuda.Stream()):
        return _finish(args, runner)


def _finish(args: argparse.Namespace, runner: Runner) -> int:
    if args.command == "session":
        names = args.cases.split(",")
        return session.work_through(runner, _video(args), names, args.worker_progress)
    if args.cpu:
        runner.console.print("[yellow]CPU reference: these times say nothing about the kernels[/]")
    elif args.command != "roofline" and not args.no_roofline:
        runner.run_roofline()
    _RUNS[args.command](args, runner)
    runner.console.print(rows_table(runner.rows))
    if args.plot is not None and not _draw(runner.rows, args.plot, runner.console):
        return 1
    return 1 if runner.failed else 0


def _options(args: argparse.Namespace, device: torch.device) -> Options:
    options = Options(device, args.l2, args.budget, not args.no_graphs, args.json, args.csv, args.commit)
    # A worker's rows are those of its session.
    options.command = getattr(args, "session_command", None) or options.command
    options.date = getattr(args, "session_date", None) or options.date
    return options


def _backends(args: argparse.Namespace, console: Console) -> list[backends.Backend]:
    names = tuple(args.backends.split(","))
    if unknown := set(names) - set(backends.NAMES):
        raise shapes.UsageError(
            f"--backends: got {', '.join(sorted(unknown))}, expected {', '.join(backends.NAMES)}"
        )
    if args.cpu:
        found, missing = [backends.Vsa(), backends.TorchDense()], {}
    else:
        peers = args.peers if args.peers.is_dir() else None
        found, missing = backends.discover(names, fa3_library=args.fa3_library, peers=peers)
    for backend in found:
        if isinstance(backend, backends.Vsa):
            backend.deterministic = args.deterministic
    print_backends(console, found, missing)
    return found


def _video(args: argparse.Namespace) -> VideoSource:
    tokens = args.video_tokens
    if tokens is None and args.clip is None and _TOKENS.is_file():
        tokens = _TOKENS
    return VideoSource(tokens, args.clip)


def _shapes(args: argparse.Namespace, default: str) -> list[shapes.Shape]:
    text = "tiny" if args.cpu and args.shape in (None, "wan") else args.shape or default
    found = shapes.find_shapes(text, heads=args.heads, head_dim=args.head_dim, batch=args.batch)
    if args.topk is not None:
        return [shape.keep(topk=topk) for shape in found for topk in args.topk]
    return [shape.keep(sparsity=sparsity) for shape in found for sparsity in args.sparsity or [None]]


def _problem(args, runner: Runner, shape: shapes.Shape, with_lists: bool) -> Problem:
    return make_problem(
        shape, args.pattern, seed=args.seed, dtype=getattr(torch, args.dtype), device=runner.device,
        video=_video(args), with_lists=with_lists,
    )  # fmt: skip


def _run_fine(args, runner: Runner) -> None:
    for shape in _shapes(args, "floor-d128"):
        problem = _problem(args, runner, shape, with_lists=True)
        for direction in args.passes:
            runner.fine(problem, direction)


def _run_op(args, runner: Runner) -> None:
    for shape in _shapes(args, "wan-1.3b-448p"):
        problem = _problem(args, runner, shape, with_lists=False)
        problem.gate_fine = None
        problem.gate_coarse = {"none": None, "off": 0.0}.get(args.gates)
        if args.gates == "tensor":
            problem.gate_coarse = torch.randn_like(problem.query) * 0.1
        for direction in args.passes:
            runner.whole_op_and_fine(problem, direction)


def _run_coarse(args, runner: Runner) -> None:
    for shape in _shapes(args, "wan-1.3b-448p"):
        measure_coarse(runner, _problem(args, runner, shape, with_lists=True))


def _run_block(args, runner: Runner) -> None:
    for name in ["tiny"] if args.cpu else args.models.split(","):
        if name not in block.MODELS:
            raise shapes.UsageError(f"--models: got {name!r}, expected {', '.join(block.MODELS)}")
        for direction in args.passes:
            block.measure_block(runner, name, direction, sparsity=args.sparsity, seed=args.seed)
    runner.console.print(block_table(runner.rows))


def _run_speedup(args, runner: Runner) -> None:
    for shape in _shapes(args, "wan"):
        problem = _problem(args, runner, shape, with_lists=False)
        problem.gate_fine = problem.gate_coarse = None
        for direction in args.passes:
            runner.whole_op(problem, direction)
    runner.console.print(speedup_table(runner.rows))


def _run_roofline(args, runner: Runner) -> None:
    runner.run_roofline()


def _supervise(args: argparse.Namespace, console: Console) -> int:
    names = args.cases.split(",")
    if unknown := set(names) - {case.name for case in session.CASES}:
        raise shapes.UsageError(f"--cases: got {', '.join(sorted(unknown))}, expected some of the default's")
    runner = Runner(_options(args, torch.device("cuda")), [], console)
    args.json = args.json.resolve()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    progress = args.json.with_name(args.json.name + ".progress")
    forwarded = [
        "session",
        "--backends",
        args.backends,
        "--peers",
        str(args.peers.resolve()),
        "--l2",
        args.l2,
    ]
    forwarded += ["--session-command", runner.options.command, "--session-date", runner.options.date]
    forwarded += ["--budget", str(args.budget), "--json", str(args.json), "--seed", str(args.seed)]
    for name in ("fa3_library", "csv", "commit", "clip", "video_tokens"):
        if getattr(args, name) is not None:
            value = getattr(args, name)
            path = value.resolve() if isinstance(value, Path) else value
            forwarded += [f"--{name.replace('_', '-')}", str(path)]
    forwarded += [
        f"--{name.replace('_', '-')}" for name in ("no_graphs", "deterministic") if getattr(args, name)
    ]
    code = session.supervise(
        runner, session.worker_prefix(forwarded, progress), progress, seconds=args.seconds, names=names
    )
    progress.unlink(missing_ok=True)
    if args.plot is not None and args.json.exists():
        _draw(read_json(args.json), args.plot, console)
    return code


def _draw(rows: list[Row], path: Path, console: Console) -> bool:
    from bench.plots import draw

    drawn = draw(rows, path)
    console.print(f"wrote {path}" if drawn else "no plot: no row has a TFLOP/s figure")
    return drawn


def _flops(args: argparse.Namespace, console: Console) -> int:
    model = flops.TrainingFlops(args.params, args.dim, args.layers, args.tokens, args.topk, args.gates)
    share = 100 * flops.implied_attention_share(_PAPER_REDUCTION, _PAPER_CUT)
    cut, cubes = model.attention_cut, args.tokens // 64
    dense = f"{model.attention:.4g} ({100 * model.attention_share:.1f} %)"
    for line in (
        "Training FLOPs a token by the paper's accounting: 6 N for the weights, 14 S dim a layer for",
        "attention (FlashAttention's formula: 4 S dim forward, 2.5 times that backward).",
        f"  N = {args.params / 1e6:.0f}M parameters, dim {args.dim}, {args.layers} layers",
        "      (the paper's 410M model, whose widths it does not give: 1024 and 24 are assumed)",
        f"  S = {args.tokens:,} tokens; {args.topk} of {cubes} cubes: attention / {cut:.3g}",
        f"  {args.gates} gate projections a layer beyond N",
        f"weights {model.weights:.4g}, dense attention {dense}",
        f"dense / VSA = [bold]{model.reduction:.2f}x[/]",
        f"paper: {_PAPER_REDUCTION}x, with {_PAPER_CUT}x for attention. Together they imply that attention",
        f"is {share:.1f} % of the dense FLOPs: N = 410M with dim x layers = 24,000 (assumed: 24,576).",
    ):
        console.print(line, highlight=False)
    files = args.rows if args.rows is not None else sorted((ROOT / "bench" / "results").glob("*.json"))
    rows = [row for file in files if file.name != "gpu_tests.json" for row in read_json(file)]
    step = block.measured_step(rows, "paper-410m", "fwd+bwd")
    if step is None:
        console.print("measured step time of a block, dense / VSA: not yet measured")
    else:
        console.print(
            f"measured step time of a 410M-shaped block, dense / VSA: {number(step.speedup)}x "
            f"({step.dense_ms:.3g} / {step.sparse_ms:.3g} ms)"
        )
    return 0


def _plot(args: argparse.Namespace, console: Console) -> int:
    return 0 if _draw([row for file in args.files for row in read_json(file)], args.output, console) else 1


def _tokens(args: argparse.Namespace, console: Console) -> int:
    grid = shapes.find_shapes(args.grid)[0].grid.video_shape
    tokens = clip_tokens(grid, args.clip).to(torch.float16)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(tokens, args.output)
    console.print(
        f"wrote {args.output}: tokens {tuple(tokens.shape)}, {args.output.stat().st_size / 1e6:.1f} MB"
    )
    return 0


def _readme(args: argparse.Namespace, console: Console) -> int:
    from bench import readme

    if args.write:
        readme.write(ROOT / "README.md", ROOT / "bench" / "results")
    problems = readme.check(ROOT / "README.md", ROOT / "bench" / "results")
    for problem in problems:
        console.print(f"[red]README.md:[/] {problem}")
    return 1 if problems else 0


def _list_shapes(args: argparse.Namespace, console: Console) -> int:
    for shape in shapes.SHAPES.values():
        kept = f"top-{shape.resolved_topk} of {shape.grid.num_cubes}"
        console.print(f"{shape.name:20} {shape!s:28} {kept:18} {shape.source}", highlight=False)
    return 0


def _floors(args: argparse.Namespace, console: Console) -> int:
    from bench.report import targets_table

    rows = [row for file in args.files for row in read_json(file)]
    console.print(targets_table(rows))
    return 1 if any(target.verdict(rows) == "below the floor" for target in floors.TARGETS) else 0


_RUNS = {
    "fine": _run_fine,
    "op": _run_op,
    "coarse": _run_coarse,
    "roofline": _run_roofline,
    "block": _run_block,
    "speedup": _run_speedup,
}
_OFFLINE = {
    "flops": _flops,
    "plot": _plot,
    "tokens": _tokens,
    "readme": _readme,
    "shapes": _list_shapes,
    "floors": _floors,
}
