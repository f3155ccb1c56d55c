"""The emulation itself: each mistake of broken.cu is caught, its corrected form passes, in every thread order."""

from __future__ import annotations

import re
import subprocess

import _build as build
import pytest

ORDERS = ("forward", "reverse", "random")

#: What is reported for each mistake. "wrong" is a result that differs; the rest are errors and sanitizers' reports.
CAUGHT = {
    "rotate": "wrong",
    "broadcast": "wrong",
    "use_twice": "wrong",
    "barrier_for_half": r"thread \(\d+, 0, 0\) waits in __syncthreads for thread \(\d+, 0, 0\), which has returned",
    "shuffle_for_most": r"waits in __shfl_xor_sync for thread \(31, 0, 0\), which has returned",
    "different_collectives": r"waits in __\w+_sync for thread \(\d+, 0, 0\), which waits in __\w+_sync",
    "wrong_lane": "wrong",
    "lane_outside_mask": r"wrong at 0: -?nan",
    "past_the_end": "AddressSanitizer: heap-buffer-overflow",
    "past_the_tile": "AddressSanitizer: heap-buffer-overflow",
    "misaligned": "misaligned address .* requires 16 byte alignment",
    "unwritten": r"wrong at 5: -?nan",
    "fragments": "wrong",
    "transposed_fragments": "wrong",
    "loaded_fragments": "wrong",
    "no_wait": r"wrong at \d+: -?nan",
    "wrong_group": r"wrong at \d+: -?nan",
    "last_block": "wrong",
}
#: A race that one order happens to win: why there are three.
LUCKY = {("broadcast", "forward"), ("no_wait", "reverse"), ("wrong_group", "reverse"), ("last_block", "forward")}


@pytest.fixture(scope="module")
def program():
    if build.missing():
        pytest.skip(build.missing())
    return build.build("broken")


def _run(program, case, form, order):
    """What it said, and what the sanitizers said."""
    result = subprocess.run([program, case, form, order], capture_output=True, text=True, timeout=60)
    return result.stdout, result.stderr


@pytest.mark.parametrize("case", CAUGHT)
def test_mistakes_are_caught(program, case):
    for order in ORDERS:
        said, reported = _run(program, case, "broken", order)
        if (case, order) in LUCKY:
            assert said == "right\n"
        else:
            assert re.search(CAUGHT[case], said + reported), f"{case}, {order}: {said}{reported}"


@pytest.mark.parametrize("case", CAUGHT)
def test_corrected_kernels_pass(program, case):
    for order in ORDERS:
        said, reported = _run(program, case, "fixed", order)
        assert said == "right\n", f"{case}, {order}: {said}{reported}"
