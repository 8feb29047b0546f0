"""Tests of what `python -m drpo_kernels compile` reads from a binary and checks in it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from drpo_kernels.aot.binaries import TARGETS, CompiledKernel, Usage, faults
from drpo_kernels.aot.loops import Loop, amdgcn, innermost_loops, sass

pytest.importorskip("triton")
from drpo_kernels import objectives
from drpo_kernels.aot.case import Bounds, Expected
from drpo_kernels.aot.cases import BOUNDS, kernel_cases
from drpo_kernels.objective import built_in_objectives

ROOT = Path(__file__).resolve().parents[2]

SASS = """
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ;      /* 0x0 */
        /*0050*/               @P1 BRA 0x00a0 ;                          /* 0x0 */
        /*0060*/                   LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0070*/              @!P2 LDG.E.LTC128B.128 R8, desc[UR4][R2.64] ;  /* 0x0 */
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R8 ;       /* 0x0 */
        /*0090*/              @!P0 BRA 0x60 ;                            /* 0x0 */
        /*00a0*/                   LDGSTS.E.BYPASS.128 [R9], desc[UR4][R2.64] ;  /* 0x0 */
        /*00b0*/               @P3 BRA 0xd0 ;                            /* 0x0 */
        /*00c0*/                   BRA P4, 0xa0 ;                        /* 0x0 */
        /*00d0*/                   STG.E desc[UR4][R2.64], R8 ;          /* 0x0 */
        /*00e0*/              @UP0 BRA.U 0xa0 ;                          /* 0x0 */
        /*00f0*/                   FADD R1, R1, 0x60 ;                   /* 0x0 */
        /*0100*/                   BRA 0x40 ;                            /* 0x0 */
        /*0110*/                   BRA 0x110;                            /* 0x0 */
"""

AMDGCN = """
row:
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; %.lr.ph
	global_load_dwordx4 v[74:77], v[68:69], off
	s_cbranch_execz .LBB0_2
	buffer_load_ushort v5, v[6:7], off
	buffer_store_short_d16_hi v4, v[6:7], off
	s_branch .LBB0_1
.LBB0_2:
	global_store_dwordx2 v[0:1], v2, off
"""


def test_loops_of_sass():
    """Only innermost loops count. A loop head with two backward jumps counts once, and an
    endless empty loop does not.
    """
    loops = innermost_loops(list(sass(SASS)))
    assert loops == (Loop(18, 8, 16, 64, 4, masked=True), Loop(16, 4, 128, 32, 5))


def test_loops_of_amd_assembly():
    assert innermost_loops(list(amdgcn(AMDGCN))) == (Loop(18, 2, 16, 16, 5),)


ROW_SASS = """
        /*0040*/                   LDG.E.128 R8, desc[UR4][R2.64] ;      /* 0x0 */
        /*0050*/                   FMUL R8, R8, R1 ;                     /* 0x0 */
        /*0060*/                   MUFU.EX2 R8, -|R8| ;                  /* 0x0 */
        /*0070*/              @!P1 MUFU.RCP R9, R8 ;                     /* 0x0 */
        /*0080*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;           /* 0x0 */
        /*0090*/                   NOP ;                                 /* 0x0 */
        /*00a0*/               @P0 BRA 0x40 ;                            /* 0x0 */
        /*00b0*/               @P2 BRA 0xd0 ;                            /* 0x0 */
        /*00c0*/                   LDG.E.128 R8, desc[UR4][R2.64] ;      /* 0x0 */
        /*00d0*/              @!P0 BRA 0xb0 ;                            /* 0x0 */
        /*00e0*/               @P2 BRA 0x100 ;                           /* 0x0 */
        /*00f0*/                   STG.E.64 desc[UR4][R2.64], R8 ;       /* 0x0 */
        /*0100*/                   LDG.E.64 R8, desc[UR4][R2.64] ;       /* 0x0 */
        /*0110*/              @!P0 BRA 0xe0 ;                            /* 0x0 */
"""

ROW_AMDGCN = """
.LBB0_1:                                ; %.lr.ph
	global_load_dwordx4 v[74:77], v[68:69], off
	s_waitcnt vmcnt(0)
	v_exp_f32_e32 v1, v74
	; a comment
	s_nop 0
	v_frexp_exp_i32_f32_e32 v5, v74
	v_rcp_iflag_f32_e64 v2, -v75
	v_sqrt_f32_e32 v3, v76
	v_log_f32_e32 v4, v77
	.p2align 3
	s_cbranch_scc0 .LBB0_1
.LBB0_2:
	s_cbranch_execz .LBB0_3
	global_load_dwordx4 v[74:77], v[68:69], off
.LBB0_3:
	s_cbranch_scc0 .LBB0_2
"""


def test_instructions_of_sass():
    """A loop with a skipped load counts as masked, one with a skipped store does not; padding is not counted."""
    expected = Loop(16, 0, 128, 0, 6, 2), Loop(16, 0, 128, 0, 3, masked=True), Loop(8, 8, 64, 64, 4)
    assert innermost_loops(list(sass(ROW_SASS))) == expected


def test_instructions_of_amd_assembly():
    expected = Loop(16, 0, 128, 0, 8, 4), Loop(16, 0, 128, 0, 3, masked=True)
    assert innermost_loops(list(amdgcn(ROW_AMDGCN))) == expected


def test_cost_of_an_element():
    """The cost is per element, whatever number of elements an unrolled loop loads, with their bias."""
    assert Loop(48, 0, 128, 0, 60, 12).per_element(6) == (7.5, 1.5)
    assert Loop(96, 0, 128, 0, 120, 24).per_element(6) == (7.5, 1.5)
    assert Loop(0, 16, 0, 128, 60).per_element(4) is Loop(48, 0, 128, 0, 60).per_element(0) is None


# For a row of fp32 logits the two loops take 10 and 6 instructions for an element, and the masked tail is slow.
FIRST, SECOND = Loop(32, 0, 128, 0, 80, 8), Loop(32, 16, 128, 128, 48, 8)
TWO_PASSES = Usage(registers=64, loops=(FIRST, SECOND, Loop(32, 0, 128, 0, 800, 80, masked=True)))


def test_the_costliest_whole_loop_is_shown():
    kernel = CompiledKernel("row", "sm_90", 1.0, TWO_PASSES, element_bytes=4)
    assert kernel.per_element == (10, 1)
    assert replace(kernel, element_bytes=0).per_element is None


GOOD = Usage(load_bits=128, store_bits=128, loops=(Loop(32, 16, 128, 128), Loop(0, 64, 0, 128)))
ROW = Expected(load_bits=128, store_bits=128, loop_load_bytes=32)


def of_a_row(**bounds):
    return Expected(element_bytes=4, bounds=Bounds(**bounds))


@pytest.mark.parametrize(
    "found, usage, expected",
    [
        ([], GOOD, ROW),
        ([], Usage(), Expected()),
        (["SPILLS"], Usage(local_bytes=8), Expected()),
        ([], Usage(local_bytes=8), Expected(local_bytes=8)),
        (["SHARED"], Usage(shared_bytes=232_449), Expected()),
        (["NARROW"], Usage(load_bits=64), Expected(load_bits=128)),
        (["NARROW"], Usage(load_bits=128, store_bits=128, loops=(*GOOD.loops, Loop(32, 16, 32, 128))), ROW),
        (
            [],
            Usage(load_bits=128, store_bits=128, loops=(*GOOD.loops, Loop(32, 16, 32, 16))),
            Expected(128, 128, 32, 1),
        ),
        (["RELOADS"], Usage(load_bits=128, store_bits=128, loops=(Loop(48, 0, 128, 0),)), ROW),
        ([], TWO_PASSES, of_a_row(reading=10, writing=6, registers=64)),
        (["SLOW"], TWO_PASSES, of_a_row(reading=9.5)),
        (["SLOW"], TWO_PASSES, of_a_row(writing=5.5)),
        (["SLOW"], Usage(loops=(SECOND,)), of_a_row(reading=10)),
        (["SLOW"], Usage(loops=(FIRST,)), of_a_row(writing=10)),
        (["SLOW"], TWO_PASSES, replace(of_a_row(writing=6), element_bytes=0)),
        (["SPECIAL"], TWO_PASSES, of_a_row(special=0.5)),
        (["REGISTERS"], TWO_PASSES, of_a_row(registers=63)),
        ([], TWO_PASSES, of_a_row(reading=1, special=0, registers=1, targets=("sm_100",))),
    ],
)
def test_faults(found, usage, expected):
    assert [fault for fault, _ in faults(expected, "sm_90", usage)] == found


def test_faults_say_what_is_taken_and_what_is_allowed():
    found = dict(faults(of_a_row(reading=9.5, writing=5, registers=32), "sm_90", TWO_PASSES))
    assert found["SLOW"].startswith("takes 10.00 instructions per element in a loop that loads alone, where 9.5 are")
    assert "6.00 instructions per element in a loop that loads and stores, where 5 are allowed" in found["SLOW"]
    assert found["REGISTERS"] == "takes 64 registers per thread, where 32 are allowed"
    (missing,) = dict(faults(of_a_row(writing=9), "sm_90", Usage())).values()
    assert missing == "has no loop over whole blocks that loads and stores"


def test_every_bound_is_some_kernels():
    bounds = [case.expected.bounds for case in kernel_cases()]
    assert [name for name, bound in BOUNDS.items() if not any(bound is found for found in bounds)] == []


def test_every_twin_of_an_objective_has_a_case():
    """The twins are those of the registered objectives, whatever settings choose them. A twin is recognised by its
    arguments.
    """
    compiled = {case.constexprs.get("terms.objective") for case in kernel_cases() if case.name.startswith("policy[")}
    functions = (value for value in vars(objectives).values() if hasattr(value, "arg_names"))
    twins = {value for value in functions if list(value.arg_names) == ["logp", "old", "adv", "hyper"]}
    assert len(twins) > 5 and twins - compiled == set()
    chosen = (cls().twin for cls in built_in_objectives())
    assert {twin for twin in chosen if twin is not None} <= compiled


def outside_the_interpreter(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command without TRITON_INTERPRET, which this process has set."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_kernel_that_moves_or_computes_too_much_fails(tmp_path):
    report = tmp_path / "report.json"
    arguments = ("--cases", "faulty_kernels:cases", "--targets", "sm_90,gfx942", "--json", str(report))
    result = outside_the_interpreter("-m", "drpo_kernels", "compile", *arguments)
    assert result.returncode == 1, result.stdout + result.stderr
    kernels = {(k["name"], k["target"]): k for k in json.loads(report.read_text())["kernels"]}
    statuses = {case: kernel["status"] for case, kernel in kernels.items()}
    wrong = {"right": "ok", "twice": "RELOADS", "narrow": "NARROW", "slow": "SLOW"}
    expected = {(name, target): word for name, word in wrong.items() for target in ("sm_90", "gfx942")}
    assert statuses == expected | {("slow", "gfx942"): "ok"}  # the bounds are not for its row tile
    assert "64 bytes per thread and iteration, where 32 are enough" in result.stdout
    assert list(kernels["slow", "sm_90"]["faults"]) == ["SLOW", "SPECIAL", "REGISTERS"]
    assert "1 take too many special-function ones, 1 take too many registers" in result.stdout
    for target in ("sm_90", "gfx942"):
        (loop,) = kernels["right", target]["usage"]["loops"]
        cost = loop["per_element"]
        assert 4 <= cost["special"] <= 5 < cost["instructions"] < 60
        (row,) = re.findall(rf"^right +{target} .*", result.stdout, re.MULTILINE)
        assert row.split()[-4:-2] == [f"{cost['instructions']:.2f}", f"{cost['special']:.2f}"]


LAYOUTS = """
import sys, triton
from drpo_kernels.aot.cases import kernel_cases
from drpo_kernels.aot.binaries import TARGETS, gpu_target
for case in kernel_cases():
    if case.name in ("policy[drpo fp32>fp32]", "gradient[bf16>bf16]"):
        for target in filter(case.launched_on, TARGETS):
            print(triton.compile(case.source(), target=gpu_target(target), options=case.launch_options()).asm["ttgir"])
"""


def test_in_place_each_thread_overwrites_what_it_alone_has_read():
    """Every load and store of a row has one layout, and no element of a block is in two threads."""
    result = outside_the_interpreter("-c", LAYOUTS)
    assert result.returncode == 0, result.stderr
    modules = result.stdout.split("module attributes")[1:]
    preambles = re.findall(r"#blocked\d* = .*", result.stdout)
    assert len(modules) == len(preambles) == 2 * len(TARGETS)
    for module, layout in zip(modules, preambles, strict=True):
        accesses = set(re.findall(r"tt\.(?:load|store) .*?: tensor<(\d+)x!tt\.ptr<\w+>, (#\w+)>", module))
        ((block, _),) = accesses
        threads = [int(n) for n in re.findall(r"(?:sizePerThread|threadsPerWarp|warpsPerCTA) = \[(\d+)\]", layout)]
        assert threads[0] * threads[1] * threads[2] <= int(block)
