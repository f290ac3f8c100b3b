"""tools/check_kernels.py on made-up listings: that it keeps quiet on good ones, and can fail."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(TOOLS), *sys.path])
    import check_kernels

SCALE = "_ZN8gradclip4cuda43_GLOBAL__N__618bbb7b_10_kernels_cu_dfbcfac312" + (
    "scale_kernelINS0_5TableILi40EEEEEvT_NS0_4ClipE"
)
NORM = "_ZN8gradclip4cuda43_GLOBAL__N__618bbb7b_10_kernels_cu_dfbcfac317" + (
    "power_sums_kernelILNS_4NormE1ELb0ENS0_5TableILi40EEEEEvT1_bPdS7_"
)
DECAY = NORM.replace("ELb0ENS0_5Table", "ELb1ENS0_10DecayTable")
FINISH = "_ZN8gradclip4cuda43_GLOBAL__N__618bbb7b_10_kernels_cu_dfbcfac313" + (
    "finish_kernelENS_4NormEPKdiPdNS_5DTypeEPv"
)
GOOD = check_kernels.Resources(registers=40, stack=0, spills=0)

TABLE = "LDC R5, c[0x0][R4+0x210]"
LOOP = [
    "LDG.E.128 R8, desc[UR6][R28.64]",
    "ULDC UR4, c[0x0][0x7f28]",
    "LDG.E.128 R12, desc[UR6][R28.64+0x1000]",
    "LDG.E.128 R16, desc[UR6][R28.64+0x2000]",
    "LDG.E.128 R20, desc[UR6][R28.64+0x3000]",
    "FFMA R9, R8, R8, R9",
    "@!P0 BRA 0x2f30",
]


def listing(name, instructions):
    lines = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for i, instruction in enumerate(instructions):
        address, code = f"        /*{16 * i:04x}*/", "/* 0x00000a00ff017b82 */"
        lines += [f"{address}                   {instruction} ;    {code}"]
        lines += [f"                                            {code}"]
    return "\n".join(lines)


def instructions(name, texts):
    return check_kernels.instructions_of_kernels(listing(name, texts))[name]


def problems(name, texts, resources=GOOD, architecture="sm_90"):
    return check_kernels.violations(name, architecture, resources, instructions(name, texts))


def test_report_of_ptxas():
    report = (
        f"ptxas info    : Compiling entry function '{NORM}' for 'sm_90'\n"
        f"ptxas info    : Function properties for {NORM}\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem\n"
        f"ptxas info    : Compiling entry function '{SCALE}' for 'sm_90'\n"
        f"ptxas info    : Function properties for {SCALE}\n"
        "    64 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers\n"
    )
    assert check_kernels.resources_of_kernels(report) == {NORM: GOOD, SCALE: (255, 64, 20)}


def test_report_in_another_form():
    with pytest.raises(ValueError, match="another form"):
        check_kernels.resources_of_kernels(f"Compiling entry function '{NORM}' for 'sm_90'\n")


def test_names():
    assert check_kernels.label_of(NORM) == "power_sums<1, 0, 40>"
    assert check_kernels.label_of(DECAY) == "power_sums<1, 1, 40, decay>"
    assert check_kernels.label_of(SCALE) == "scale<40>"
    assert check_kernels.label_of(FINISH) == "finish"


def test_listing():
    found = instructions(NORM, ["@!UP0 LDCU UR22, c[0x0][UR13+0x6784]", "EXIT"])
    assert found == [(0, "!UP0", "LDCU", "UR22, c[0x0][UR13+0x6784]"), (16, "", "EXIT", "")]


class TestNorm:
    CODE = (TABLE, *LOOP * 4, "EXIT")

    def test_good(self):
        assert problems(NORM, self.CODE) == []

    @pytest.mark.parametrize(
        ("resources", "problem"),
        [
            (check_kernels.Resources(40, 32, 0), "32 bytes of stack"),
            (check_kernels.Resources(40, 0, 8), "8 bytes of spills"),
        ],
    )
    def test_resources(self, resources, problem):
        assert problems(NORM, self.CODE, resources) == [problem]

    @pytest.mark.parametrize(
        ("instruction", "problem"),
        [
            ("LDL R4, [R1]", "LDL: local memory"),
            ("@P0 STL.64 [R1+0x8], R4", "STL: local memory"),
            ("LD.E R4, [R2.64]", "LD: memory of unknown kind"),
            ("LDG.E.U8 R4, desc[UR6][R2.64]", "LDG.E.U8: a load taken apart into bytes"),
            ("PREEXIT", "PREEXIT: lets the next kernel start before this one has written"),
        ],
    )
    def test_instructions(self, instruction, problem):
        assert problems(NORM, [instruction, *self.CODE]) == [problem]

    def test_table_on_the_stack(self):
        assert problems(NORM, ["LDC R5, c[0x0][0x7f10]", *LOOP * 4]) == [
            "the table is not read from the constant bank"
        ]

    def test_decay_reads_two_vectors_at_a_time(self):
        assert problems(DECAY, [TABLE]) == []

    @pytest.mark.parametrize(
        "loop",
        [
            pytest.param([*LOOP[:4], LOOP[5], LOOP[4]], id="used before the last is on its way"),
            pytest.param([*LOOP[:4], "BRA 0x10", LOOP[4]], id="jump between them"),
            pytest.param([*LOOP[:4], f"@P0 {LOOP[4]}"], id="the last under a condition"),
            pytest.param(LOOP[:4], id="three"),
            pytest.param(
                [*LOOP[:4], "LDG.E.128 R20, desc[UR6][R30.64+0x3000]"], id="from elsewhere"
            ),
            pytest.param([line.replace("LDG.E.128", "LDG.E.64") for line in LOOP], id="too narrow"),
        ],
    )
    def test_one_loop_without_four_loads_in_flight(self, loop):
        assert problems(NORM, [TABLE, *LOOP * 3, *loop]) == [
            "3 loops with 4 loads in flight, not 4"
        ]


def test_loop_that_rounds_to_bfloat16_without_an_instruction():
    code = [TABLE, "ACQBULK", *LOOP * 3]
    assert problems(SCALE, code, architecture="sm_75") == []
    assert problems(SCALE, code, architecture="sm_80") == ["3 loops with 4 loads in flight, not 4"]


@pytest.mark.parametrize("opcode", ["LDG.E.128", "LDG.E.128.SYS", "LDG.E.EF.128"])
def test_every_spelling_of_a_vector_load(opcode):
    # The second is that of sm_75, the third one that is not to stay in the cache.
    loop = [line.replace("LDG.E.128", opcode) for line in LOOP]
    assert problems(NORM, [TABLE, *loop * 4]) == []


def test_unknown_kernel():
    name = NORM.replace("17power_sums_kernel", "10new_kernel")
    assert problems(name, TestNorm.CODE) == [
        "nothing is known of it: add new_kernel to LOOPS in check_kernels.py"
    ]


class TestWait:
    RESULT = "LDG.E.64.STRONG.GPU R6, desc[UR16][R6.64]"
    CODE = ("LDC R1, c[0x0][0x28]", "ACQBULK", RESULT, "EXIT")

    def test_good(self):
        assert problems(FINISH, self.CODE) == []

    def test_scale_waits_too(self):
        code = [TABLE, "ACQBULK", *LOOP * 4]
        assert problems(SCALE, code) == []
        assert "LDG.E.128 before the wait" in problems(SCALE, [*LOOP, *code])

    @pytest.mark.parametrize(
        ("instruction", "problem"),
        [
            (RESULT, "LDG.E.64.STRONG.GPU before the wait"),
            ("STG.E.64 desc[UR4][R2.64], R4", "STG.E.64 before the wait"),
            ("@P0 EXIT", "EXIT that may pass the wait"),
            ("@P0 BRA 0x100", "BRA that may pass the wait"),
        ],
    )
    def test_too_early(self, instruction, problem):
        assert problems(FINISH, [instruction, *self.CODE]) == [problem]

    @pytest.mark.parametrize("jump", ["@P1 BRA 0x10", "BRA.U !UP0, 0x20", "BRA.U UP0, 0x0"])
    def test_a_loop_before_it(self, jump):
        # The wait is at 0x20.
        assert problems(FINISH, [self.CODE[0], jump, *self.CODE[1:]]) == []

    @pytest.mark.parametrize("jump", ["@!P1 BRA 0x30", "BRA.U UP0, 0x40", "BRX R4 -0x10"])
    def test_a_jump_beyond_it(self, jump):
        kind = jump.removeprefix("@!P1 ").split()[0]
        found = problems(FINISH, [self.CODE[0], jump, *self.CODE[1:]])
        assert found == [f"{kind} that may pass the wait"]

    def test_there_is_none_before_sm_90(self):
        code = [line for line in self.CODE if line != "ACQBULK"]
        assert problems(FINISH, code, architecture="sm_89") == []
        assert problems(FINISH, code) == [
            "LDG.E.64.STRONG.GPU before the wait",
            "EXIT that may pass the wait",
            "no wait (ACQBULK)",
        ]
