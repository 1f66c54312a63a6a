"""sass.py on small texts, in the form that nvdisasm and cuobjdump print."""

import pytest

import sass

TEXT = """\
	.headerflags	@"EF_CUDA_SM90"
.text._Z5outerPf:
	.section	.text._Z5outerPf,"ax",@progbits
.text._Z5outerPf:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_3:
        /*0010*/                   STL [R1], R2 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
.L_x_1:
        /*0030*/              @!P0 SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6], R3 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   LDL.LU R9, [R1+0x4] ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0070*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0080*/                   LDL R8, [R1] ;
        /*0090*/                   HGMMA.64x64x16.F32.BF16 R88, R4, gdesc[UR8] ;
        /*00a0*/                   MUFU.EX2 R5, R5 ;
        /*00b0*/               @P0 BRA `(.L_x_4) ;
        /*00c0*/               @P1 BRA `(.L_x_2) ;
.L_x_4:
        /*00d0*/               @P2 BRA.U `(.L_x_3) ;
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5);
	.section	.text._Z4plaini,"ax",@progbits
.text._Z4plaini:
.L_x_6:
        /*0000*/                   FADD R2, R2, 1 ;
        /*0010*/               @P0 BRA `(.L_x_6) ;
"""

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _Z5outerPf:
  REG:168 STACK:16 SHARED:304 LOCAL:0 CONSTANT[0]:864 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z4plaini:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:532 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.fixture
def kernels():
    return sass.parse(TEXT)


def test_instructions(kernels):
    assert set(kernels) == {"_Z5outerPf", "_Z4plaini"}
    instructions = kernels["_Z5outerPf"].instructions
    assert [i.address for i in instructions] == list(range(0, 0x100, 0x10))
    assert instructions[3].opcode == "SYNCS.PHASECHK.TRANS64.TRYWAIT"
    assert instructions[5].is_a(("LDL",)) and not instructions[5].is_a(("LD", "LDC"))
    assert instructions[7].opcode == "UIADD3"


def test_loops_are_backward_branches(kernels):
    loops = kernels["_Z5outerPf"].loops()
    spans = [(loop.body[0].address, loop.body[-1].address) for loop in loops]
    assert spans == [(0x30, 0x40), (0x50, 0xC0), (0x10, 0xD0), (0xF0, 0xF0)]


def test_hot_loop_is_the_innermost_with_products(kernels):
    loop = kernels["_Z5outerPf"].hot_loop()
    assert (len(loop), loop.products, loop.count("MUFU")) == (8, 2, 1)
    assert (loop.spills, loop.spills_among_products) == (2, 1)


def test_kernel_without_products_has_no_hot_loop(kernels):
    with pytest.raises(ValueError, match="no loop has a matrix product"):
        kernels["_Z4plaini"].hot_loop()


def test_resources():
    assert sass.parse_resources(USAGE) == {
        "_Z5outerPf": {"registers": 168, "stack": 16},
        "_Z4plaini": {"registers": 32, "stack": 0},
    }
