"""What the machine code of a built extension uses, read by NVIDIA's cuobjdump."""

import functools
import re
import shutil
import subprocess
import sys
from pathlib import Path


def find_cuobjdump():
    """The one of the [test] extra (nvidia-cuda-cuobjdump) first: the table is made with its version."""
    for folder in sys.path:
        candidate = Path(folder or ".") / "nvidia" / "cu13" / "bin" / "cuobjdump"
        if candidate.is_file():
            return str(candidate)
    found = shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError('no cuobjdump on sys.path or PATH: pip install -c constraints.txt ".[test]"')
    return found


@functools.cache
def run_cuobjdump(option, binary):
    command = [find_cuobjdump(), option, str(binary)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resource_usage(binary):
    """{kernel: {"REG": at launch, "STACK": bytes, "SHARED": static bytes, "LOCAL": bytes, ...}}."""
    table, kernel = {}, None
    for line in run_cuobjdump("-res-usage", binary).splitlines():
        if match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif kernel and "REG:" in line:
            table[kernel] = {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", line)}
            kernel = None
    return table


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


def highest_register(opcode, operands):
    """The highest register that one instruction touches, all of a wide operand included; -1 for none.

    "Used n registers" of ptxas is the number at launch: under setmaxnreg it says nothing of a consumer.
    """
    addresses = "".join(re.findall(r"\[[^\]]*\]", operands))
    touched = [int(index) + bool(wide) for index, wide in re.findall(r"\bR(\d+)(\.64)?", addresses)]
    data = [int(index) for index in re.findall(r"\bR(\d+)", re.sub(r"\[[^\]]*\]", "", operands))]
    for position, register in enumerate(data):
        first = register == data[0] if opcode.startswith("HGMMA") else position == 0
        touched.append(register + operand_registers(opcode, first) - 1)
    return max(touched, default=-1)


def operand_registers(opcode, first):
    """Registers of one data operand; `first` for the result of arithmetic (HGMMA: the accumulator)."""
    name, *modifiers = opcode.split(".")
    if name == "HGMMA":  # 64xNx16: N/2 fp32 accumulators a thread, four registers of A
        return int(modifiers[0].split("x")[1]) // 2 if first else 4
    if "128" in modifiers or (name in ("LDSM", "STSM") and modifiers[-1] == "4"):
        return 4
    if "64" in modifiers or name == "CS2R" or (name in ("LDSM", "STSM") and modifiers[-1] == "2"):
        return 2
    return 2 if "WIDE" in modifiers and first else 1


def functions(binary):
    """(kernel, its machine code) of each."""
    for code in re.split(r"Function : ", run_cuobjdump("-sass", binary))[1:]:
        yield code.split()[0], code


def machine_code(binary):
    """{kernel: {"registers": highest touched, plus one, "local_accesses": local loads and stores}}."""
    table = {}
    for kernel, code in functions(binary):
        entry = table[kernel] = {"registers": 0, "local_accesses": 0}
        for match in filter(None, map(INSTRUCTION.match, code.splitlines())):
            entry["registers"] = max(entry["registers"], highest_register(match[1], match[2]) + 1)
            entry["local_accesses"] += match[1].split(".")[0] in ("LDL", "STL")
    return table
