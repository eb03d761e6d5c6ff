"""What ptxas made of the kernels: operands that a loop needs again are not written over (ptxas 13.0 did),
descriptors of products stay in uniform registers, and probabilities are converted beside exponentials."""

import re

import pytest

from sass import functions
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
    checked = 0
    for name, code in functions(_extension.load().__file__):
        # The forward's loop over tasks loads its operands anew: the search would see its epilogue.
        if name.startswith(("fine_backward", "select")):
            assert overwritten_operands(code) == [], name
            checked += "HGMMA" in code
    assert checked == 26


def divergence(code):
    """How many branches may divide a warp, and moves to uniform registers stand in sequences of products.

    Both are many where ptxas does not know that a warp stays whole: it then moves the descriptors of every
    product from ordinary registers.
    """
    lines = [text for _, text in LINE.findall(code)]
    products = [i for i, text in enumerate(lines) if "HGMMA" in text]
    among = [lines[i:j] for i, j in zip(products, products[1:], strict=False) if j - i < 40]
    return sum("BRA.DIV" in x for x in lines), sum("R2UR" in x for part in among for x in part)


def test_warps_stay_whole_around_products():
    found = {
        name: divergence(code) for name, code in functions(_extension.load().__file__) if "HGMMA" in code
    }
    assert len(found) == 32
    assert {name: x for name, x in found.items() if x[0] > 1 or x[1] > 4} == {}


def conversions_beside_exponentials(code, near=8):
    """Conversions of a pair to 16 bits that have an exponential within `near` instructions on either side."""
    lines = [text for _, text in LINE.findall(code)]
    return sum(
        "F2FP" in text
        and any("MUFU.EX2" in x for x in lines[max(0, i - near) : i])
        and any("MUFU.EX2" in x for x in lines[i + 1 : i + 1 + near])
        for i, text in enumerate(lines)
    )


def test_forward_converts_beside_exponentials():
    """32 a stage of 128 keys, in a stage after a pending one and in one after none; of each most."""
    found = {
        name: conversions_beside_exponentials(code)
        for name, code in functions(_extension.load().__file__)
        if name.startswith("fine_forward")
    }
    assert len(found) == 6
    assert {name: count for name, count in found.items() if count < 2 * 28} == {}


def test_the_search_finds_conversions():
    exponential, conversion = (
        " /*0010*/ MUFU.EX2 R4, R5 ;\n",
        " /*0020*/ F2FP.BF16.F32.PACK_AB R8, R5, R4 ;\n",
    )
    assert conversions_beside_exponentials(3 * (exponential + 2 * conversion) + exponential) == 6
    assert conversions_beside_exponentials(8 * exponential + 8 * conversion) == 0


def test_the_search_finds_moved_descriptors():
    code = """
        /*0010*/                   BRA.DIV UR4, 0x80 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0030*/                   R2UR UR6, R210 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0050*/                   R2UR UR6, R210 ;
    """
    assert divergence(code) == (1, 1)


def test_the_search_finds_an_overwritten_operand():
    code = """
        /*0010*/                   LDSM.16.M88.4 R120, [R7] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, R120, gdesc[UR12], R24, gsb0 ;
        /*0030*/                   {}
        /*0040*/              @P0  BRA 0x20 ;
    """
    assert overwritten_operands(code.format("MUFU.EX2 R121, R58 ;")) == ["MUFU.EX2 R121, R58"]
    assert overwritten_operands(code.format("MUFU.EX2 R125, R58 ;")) == []
