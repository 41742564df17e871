"""What loading asks of the process."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, re, sys, tempfile, threading
from lmm_jax.inference.loading import share_heaps
share_heaps()
libc, barrier = ctypes.CDLL(None), threading.Barrier(12)
libc.malloc.restype = ctypes.c_void_p
def allocate():
    barrier.wait()
    for _ in range(1000):
        libc.malloc(ctypes.c_size_t(1000))
    barrier.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
[t.start() for t in threads], [t.join() for t in threads]
with tempfile.NamedTemporaryFile() as file:
    libc.fopen.restype = ctypes.c_void_p
    out = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, out), libc.fclose(out)
    print(len(re.findall("<heap nr=", open(file.name).read())))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
@pytest.mark.parametrize("wish", [None, "6"])
def test_threads_share_heaps(wish):
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"} | (
        {"MALLOC_ARENA_MAX": wish} if wish else {}
    )
    environment |= {"LD_PRELOAD": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    heaps = int(done.stdout)
    assert heaps == 6 if wish else heaps <= max(1, os.cpu_count() // 4)


FREED = """
import ctypes, re
from lmm_jax.inference import loading
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def resident():
    return int(re.search(r"VmRSS:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024
blocks = [libc.malloc(ctypes.c_size_t(65536)) for _ in range(3200)]
for block in blocks:
    ctypes.memset(block, 1, 65536)
for block in blocks[:-1]:  # the last one keeps the heap from shrinking
    libc.free(block)
before = resident()
loading._return_freed()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_what_is_free_goes_back_to_the_system():
    environment = os.environ | {"LD_PRELOAD": ""}
    done = subprocess.run([sys.executable, "-c", FREED], env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 150  # MiB of 200
