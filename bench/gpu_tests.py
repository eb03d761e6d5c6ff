"""Runs the GPU tests and compute-sanitizer, and records what was verified, where and when.

python -m bench.gpu_tests --commit $(git rev-parse --short HEAD) --output bench/results/gpu_tests.json
"""

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from bench import machine
from vsa_cuda import _extension

ROOT = Path(__file__).parents[1]
TESTS = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
# Of a CTA's barriers synccheck expects fewer than the kernels have.
TOOL_OPTIONS = {"synccheck": ["--num-cuda-barriers", "4096"]}
SANITIZED = "edge and few"
# racecheck takes 16 s a test.
SANITIZED_BY = {"racecheck": f"{SANITIZED} and (4x8x8 or 5x6x7 or 2x4x70 or 1x1x1)"}


def _run(command, seconds):
    """(exit code or None after `seconds`, output)."""
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        return result.returncode, result.stdout + result.stderr
    except subprocess.TimeoutExpired as expired:
        return None, (expired.stdout or b"").decode(errors="replace")


def _count(word, text):
    found = re.findall(rf"(\d+) {word}", text)
    return int(found[-1]) if found else 0


def _sanitizer(tool, seconds):
    tests = ["tests/test_gpu_attention.py", "-k", SANITIZED_BY.get(tool, SANITIZED)]
    code, text = _run(
        [
            "compute-sanitizer", "--tool", tool, *TOOL_OPTIONS.get(tool, []), "--error-exitcode", "9",
            *TESTS, *tests,
        ], seconds
    )  # fmt: skip
    return {
        "tests": shlex.join(tests),
        "exit_code": code,
        "passed": _count("passed", text),
        **sanitizer_findings(text, seconds),
    }


def sanitizer_findings(text, seconds):
    """What a tool found; apart from it, launches that it gave up on: how many, which of our kernels."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    if not summary:
        return {"summary": f"no summary within {seconds} s"}
    lost = re.findall(r"Internal Sanitizer Error: .*? while launching (\S+)", text)
    return {
        "findings": int(summary[-1]) - len(lost),
        "untracked_launches": len(lost),
        "untracked_own": sorted({*lost} & {*_extension.load().kernel_names()}),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=240, help="limit of the tests")
    parser.add_argument("--sanitizer-seconds", type=float, default=150, help="limit of each sanitizer tool")
    parser.add_argument("--tools", default="memcheck,synccheck,racecheck")
    options = parser.parse_args()
    command = [*TESTS, "tests", "--seed", str(options.seed)]
    code, text = _run(command, options.seconds)
    print("\n".join(line for line in text.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))))
    record = {
        "csrc_sha256": machine.tree_sha256(ROOT, "csrc"),
        "package_sha256": machine.tree_sha256(ROOT, "vsa_cuda", "tests"),
        "commit": options.commit,
        "device": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], 20)[1].strip(),
        "nvcc": _run(["nvcc", "--version"], 20)[1].strip().splitlines()[-1],
        "seed": options.seed,
        "command": " ".join(["python3", *command[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "exit_code": code,
        "passed": _count("passed", text),
        "failed": _count("failed", text),
        "skipped": _count("skipped", text),
        "sanitizer": {},
    }
    options.output.write_text(json.dumps(record, indent=2) + "\n")
    for tool in filter(None, options.tools.split(",")):
        record["sanitizer"][tool] = _sanitizer(tool, options.sanitizer_seconds)
        options.output.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return 0 if code == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
