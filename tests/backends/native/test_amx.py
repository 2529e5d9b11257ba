"""Matrix tiles of Intel's CPUs: a process that may not use them multiplies without them."""

import json
import platform
import subprocess
import sys

import pytest

from twotower.backends.native import build
from twotower.backends.native.compile import cpu_features

has_tiles = platform.machine() == "x86_64" and "amx_bf16" in cpu_features().split() and sys.platform == "linux"
pytestmark = pytest.mark.skipif(
    build.library() is None or not has_tiles, reason="this machine has no C compiler or no matrix tiles"
)

# A filter of system calls, as a container's runtime has: arch_prctl(ARCH_REQ_XCOMP_PERM, …) fails, all else passes.
# https://docs.kernel.org/userspace-api/seccomp_filter.html
FORBID = """
import ctypes, struct
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, EPERM = 0x7FFF0000, 0x00050001
lines = [(LOAD, 0, 0, 0), (EQUAL, 0, 3, 158), (LOAD, 0, 0, 16), (EQUAL, 0, 1, 0x1023)]
lines += [(RETURN, 0, 0, EPERM), (RETURN, 0, 0, ALLOW)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
program = struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.prctl(38, 1, 0, 0, 0)
assert not libc.prctl(22, 2, program, 0, 0), ctypes.get_errno()
assert libc.syscall(158, 0x1023, 18) == -1
"""
MULTIPLY = """
import json, torch
from twotower.backends.native.pack import pack_weight
generator = torch.Generator().manual_seed(0)
weight = torch.randn(70, 100, generator=generator).bfloat16()
x = torch.randn(40, 100, generator=generator)
packed = pack_weight(weight)
y = packed(x, None)
assert torch.equal(torch.cat([packed(x[m : m + 1], None) for m in range(40)]), y)
error = (y - x.bfloat16().float() @ weight.float().T).abs().max().item()
print(json.dumps([error, y.double().sum().item(), y.flatten()[:200].tolist()]))
"""


def run(program: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_process_that_may_not_use_tiles_multiplies_without_them() -> None:
    (error, _, values), (refused_error, _, refused) = run(MULTIPLY), run(FORBID + MULTIPLY)
    assert error < 1e-4
    assert refused_error < 1e-4
    assert values != refused  # the sums run in another order, so tiles were in use and then were not
