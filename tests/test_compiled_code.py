"""Kernels as they are compiled for a GPU, which need not be there."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from qtrain.kernels import adamw_tiles  # noqa: E402


@pytest.mark.parametrize("factor", [False, True])
def test_parts_are_read_and_written_sixteen_bytes_at_a_time(factor: bool) -> None:
    """A mask that the compiler knows too little of takes loads apart, and the kernel is as slow as plain PyTorch."""
    kernel = adamw_tiles._adamw
    constants = {"FACTOR": factor, "BLOCK": 1024}
    types = {name: "*bf16" for name in ("w_ptr", "g_ptr", "m_ptr", "v_ptr")} | {"factor_ptr": "*fp32", "size": "i32"}
    types |= dict.fromkeys(("first", "second"), "i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: types.get(name, "fp32") for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(place,): [["tt.divisibility", 16]] for place in range(6)},
    )
    # Told, for Triton 3.9 warns of a default that will change.
    options = {"enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert code.count("ld.global.v4") == 4 and code.count("st.global.v4") == 3
    assert code.count("ld.global") == 4 + factor and code.count("st.global") == 3
