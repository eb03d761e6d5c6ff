"""Compiler launcher for nvcc: `ptxas_gate.py nvcc ... -o kernel.o` (-Xptxas=-v among the options).

Runs the command, shows its output, and fails when a kernel spills, uses local memory, or has its wgmma
serialised: ptxas only informs of these, and each costs more than most bugs. Writes what ptxas said of every
kernel to kernel.o.resources.json.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

# C75xx: "Potential Performance Loss" (serialised wgmma, injected waits, ignored setmaxnreg).
FAULTS = [
    ("wgmma or setmaxnreg degraded", re.compile(r"\(C75\d\d\)|serialized", re.IGNORECASE)),
    ("spill", re.compile(r"[1-9]\d* bytes spill|Registers are spilled")),
    ("local memory", re.compile(r"[1-9]\d* bytes stack frame|[1-9]\d* bytes lmem|Local memory used")),
]
KERNEL = re.compile(r"Compiling entry function '([^']+)'")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def faults(log: str) -> list[str]:
    """The lines of an nvcc log that must not be there, each with its name."""
    found = []
    for line in log.splitlines():
        found += [f"{name}: {line.strip()}" for name, pattern in FAULTS if pattern.search(line)][:1]
    return found


def resources(log: str) -> dict[str, dict[str, int]]:
    """{kernel: {"registers": at launch, "static_shared_bytes": n}} from an nvcc log."""
    table, kernel = {}, None
    for line in log.splitlines():
        if match := KERNEL.search(line):
            kernel = match[1]
        elif kernel and (match := USED.search(line)):
            shared = SHARED.search(line)
            table[kernel] = {
                "registers": int(match[1]),
                "static_shared_bytes": int(shared[1]) if shared else 0,
            }
            kernel = None
    return table


def main(command: list[str]) -> int:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sys.stdout.write(run.stdout)
    if run.returncode != 0 or "-o" not in command:
        return run.returncode
    output = Path(command[command.index("-o") + 1])
    if found := faults(run.stdout):
        output.unlink(missing_ok=True)
        print("ptxas_gate: kernels must not spill, use local memory or serialise wgmma:")
        print("\n".join(f"  {line}" for line in found))
        return 1
    if table := resources(run.stdout):
        output.with_name(output.name + ".resources.json").write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
