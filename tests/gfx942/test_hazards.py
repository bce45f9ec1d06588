"""That no kernel relies on a wait that the hardware does not make."""

import pytest

from tests.gfx942.assembly import parse_fragment
from tests.gfx942.configurations import Workload, launches
from tests.gfx942.hazards import hazards, registers

MATRIX = "v_mfma_f32_16x16x16_bf16 v[8:11], v[0:1], v[2:3], 0\n"


def test_the_registers_of_an_operand_are_found() -> None:
    assert registers("v[4:7]") == {4, 5, 6, 7}
    assert registers("v12, s[0:1], -v3") == {12, 3}
    assert registers("s3") == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("v_and_b32 v1, 3, v5\n" + MATRIX, 1),
        ("v_and_b32 v4, 3, v1\n" + MATRIX, 0),
        ("v_and_b32 v1, 3, v5\ns_nop 0\n" + MATRIX, 1),
        ("v_and_b32 v1, 3, v5\ns_nop 1\n" + MATRIX, 0),
        ("v_and_b32 v1, 3, v5\nv_and_b32 v6, 3, v5\nv_and_b32 v6, 3, v5\n" + MATRIX, 0),
        (MATRIX + "v_and_b32 v1, 3, v9\n", 1),
        (MATRIX + "s_nop 5\nv_and_b32 v1, 3, v9\n", 1),
        (MATRIX + "s_nop 6\nv_and_b32 v1, 3, v9\n", 0),
        (MATRIX + "v_and_b32 v1, 3, v2\n", 0),
        ("v_and_b32 v1, 3, v5\n.Lthere:\n" + MATRIX, 0),
    ],
)
def test_instructions_that_are_too_close_are_found(text: str, found: int) -> None:
    assert len(hazards(parse_fragment(text))) == found


@pytest.mark.parametrize("impl", ["gluon_kernel", "triton_kernel"])
@pytest.mark.parametrize("workload", [
    Workload("route", 1, 256, 128, 1, known=24), Workload("few", 1, 256, 128, 12), Workload("many", 1, 256, 128, 40),
    Workload("fp8", 1, 256, 128, 12, activation_dtype="fp8"),
    Workload("fp8 route", 1, 256, 128, 1, activation_dtype="fp8", known=24),
], ids=lambda workload: workload.name)  # fmt: skip
def test_no_kernel_s_matrix_instructions_read_too_early(workload: Workload, impl: str) -> None:
    for launch in launches(workload, impl):
        assert hazards(launch.program) == [], launch.program.name
