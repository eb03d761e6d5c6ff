"""What ptxas made of the kernels: operands that a loop needs again are not written over (ptxas 13.0 did)."""

import re

import pytest

from sass import run_cuobjdump
from vsa_cuda import _extension

pytestmark = pytest.mark.skipif(not _extension.is_available(), reason="vsa_cuda._C is not built")

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.M)
FOUR = range(4)


def overwritten_operands(code):
    """Writes, in a loop, to registers that ldmatrix filled outside it and that the loop's products read."""
    lines = [(int(address, 16), text) for address, text in LINE.findall(code)]
    position = {address: i for i, (address, _) in enumerate(lines)}
    loads = [(i, int(m[1])) for i, (_, x) in enumerate(lines) if (m := re.search(r"\bLDSM\S* R(\d+)", x))]
    found = []
    for end, (address, text) in enumerate(lines):
        branch = re.search(r"\bBRA(?:\.\S+)? (?:\S+, )?0x([0-9a-f]+)", text)
        if branch is None or int(branch[1], 16) > address or int(branch[1], 16) not in position:
            continue
        start = position[int(branch[1], 16)]
        if any(start <= i <= end for i, _ in loads):
            continue
        body = lines[start : end + 1]
        read = {
            int(m[1]) + k for _, x in body if (m := re.search(r"HGMMA\S* R\d+, R(\d+),", x)) for k in FOUR
        }
        kept = read & {register + k for _, register in loads for k in FOUR}
        for _, x in body:
            write = re.match(r"(?:@!?U?P\w+ )?([A-Z0-9_.]+) R(\d+)(?:,|$)", x)
            if write and not write[1].startswith(("HGMMA", "ST", "BAR", "SYNCS")) and int(write[2]) in kept:
                found.append(x.strip())
    return found


def test_backward_and_selection_keep_their_operands():
    functions = re.split(r"Function : ", run_cuobjdump("-sass", _extension.load().__file__))[1:]
    checked = 0
    for code in functions:
        name = code.split()[0]
        # The forward's loop over tasks loads its operands anew: the search would see its epilogue.
        if name.startswith(("fine_backward", "select")):
            assert overwritten_operands(code) == [], name
            checked += "HGMMA" in code
    assert checked == 26


def test_the_search_finds_an_overwritten_operand():
    code = """
        /*0010*/                   LDSM.16.M88.4 R120, [R7] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR12], R24, gsb0 ;
        /*0030*/                   {}
        /*0040*/              @P0  BRA 0x20 ;
    """
    assert overwritten_operands(code.format("MUFU.EX2 R121, R58 ;")) == ["MUFU.EX2 R121, R58"]
    assert overwritten_operands(code.format("MUFU.EX2 R125, R58 ;")) == []
