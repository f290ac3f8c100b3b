"""tools/check_sweep.py on made-up listings: that it keeps quiet on good ones, and can fail."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "path", [str(TOOLS), *sys.path])
    import check_kernels
    import check_sweep

SPACE = "_ZN8gradclip4cuda5sweep52_GLOBAL__N__d3bdcd62_12_measuring_cu_48c5d57a_1100"
GOOD = check_kernels.Resources(registers=40, stack=0, spills=0)
TABLE = "LDC R5, c[0x0][R4+0x210]"


def measuring(loads):
    return f"{SPACE}20measure_tiles_kernelILi256ELi{loads}ELb0EEEvNS0_5TableILi480EEEiPd"


def scaling(streaming):
    arguments = f"ILi256ELi4ELb0ELb0ELNS1_9StreamingE{streaming}EEEvNS0_5TableILi480EEEi"
    return f"{SPACE}18scale_tiles_kernel{arguments}"


def triggering(trigger):
    return f"{SPACE}29measure_before_trigger_kernelILNS1_7TriggerE{trigger}EEEvNS0_5TableILi190EEE"


def teams(cluster):
    arguments = f"ILi512ELi32ELi2048ELb{cluster}ENS0_5TableILi40EEEEEvT3_"
    return f"{SPACE}20clip_by_teams_kernel{arguments}"


def loop(loads, opcode="LDG.E.128"):
    vectors = [f"{opcode} R{8 + 4 * k}, desc[UR6][R2.64+{k}]" for k in range(loads)]
    return [*vectors, "FFMA R9, R8, R8, R9", "@!P0 BRA 0x2f30"]


def problems(name, texts, resources=GOOD):
    instructions = [
        check_kernels.Instruction(16 * i, *_predicate(text)) for i, text in enumerate(texts)
    ]
    return check_sweep.violations(name, resources, instructions)


def _predicate(text):
    predicate, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
    opcode, _, operands = rest.partition(" ")
    return predicate.removeprefix("@"), opcode, operands


def test_labels():
    assert check_sweep.label_of(measuring(8)) == "measure_tiles<256, 8, 0, 480>"
    assert check_sweep.label_of(scaling(3)) == "scale_tiles<256, 4, 0, 0, 3, 480>"
    assert check_sweep.label_of(teams(1)) == "clip_by_teams<512, 32, 2048, 1, 40>"


@pytest.mark.parametrize("loads", [2, 4, 8])
def test_as_many_loads_in_flight_as_the_variant_says(loads):
    assert problems(measuring(loads), [TABLE, *loop(loads) * 4]) == []
    fewer = [TABLE, *loop(loads) * 3, *loop(loads // 2)]
    assert problems(measuring(loads), fewer) == [f"3 loops with {loads} loads in flight, not 4"]


def test_what_holds_for_every_kernel():
    code = [TABLE, *loop(4) * 4]
    spilled = check_kernels.Resources(40, 0, 8)
    assert problems(measuring(4), code, spilled) == ["8 bytes of spills"]
    assert problems(measuring(4), [*code, "STL [R1], R4"]) == ["STL: local memory"]
    assert problems(measuring(4), code[1:]) == ["the table is not read from the constant bank"]


def test_streaming_loads_count():
    assert problems(scaling(1), [TABLE, "ACQBULK", *loop(4, "LDG.E.EF.128") * 4]) == []


def test_scaling_waits():
    assert problems(scaling(0), [TABLE, *loop(4) * 4])[-1] == "no wait (ACQBULK)"


def test_a_trigger_where_it_belongs():
    code = [TABLE, *loop(4) * 4]
    fault = ["PREEXIT: there, or not there, as it should not be"]
    assert problems(triggering(0), code) == problems(triggering(1), [*code, "PREEXIT"]) == []
    assert problems(triggering(0), [*code, "PREEXIT"]) == problems(triggering(2), code) == fault
    assert problems(measuring(4), [*code, "PREEXIT"]) == fault


def test_memory_of_other_blocks_in_clusters_alone():
    code = [TABLE, *loop(4) * 8, "LD.E.64 R4, [R2.64]"]
    assert problems(teams(1), code) == []
    assert problems(teams(0), code) == ["LD: memory of unknown kind"]
    assert problems(teams(1), [*code, "ST.E [R2.64], R4"]) == ["ST: memory of unknown kind"]
