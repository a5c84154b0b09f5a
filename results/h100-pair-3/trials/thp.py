"""Arenas of huge pages: how long they take to make, and what lanes carry from them."""
import ctypes, mmap, statistics, sys, time, threading, json
import torch
from hwexec.cuda import CudaDevice
from hwexec.timing import time_ns
D = CudaDevice(); MIB = 1 << 20; med = statistics.median; OUT = {}
h0, h1 = D.stream("h2d:0", 0), D.stream("h2d:1", 1)
a0, a1 = D.allocate(256 * MIB, 0), D.allocate(256 * MIB, 1)
def huge():
    return sum(int(l.split()[1]) for l in open("/proc/self/smaps") if l.startswith(("AnonHugePages", "ShmemPmdMapped"))) / 1024
def make(tag, size, flags, advice, threads):
    t = time.perf_counter(); m = mmap.mmap(-1, size, flags=flags)
    if advice is not None: m.madvise(advice)
    at = ctypes.addressof(ctypes.c_char.from_buffer(m)); h = huge(); t0 = time.perf_counter()
    step = size // threads // (2 * MIB) * 2 * MIB or size
    ts = [threading.Thread(target=ctypes.memset, args=(at + o, 0, min(step, size - o))) for o in range(0, size, step)]
    [x.start() for x in ts]; [x.join() for x in ts]
    t1 = time.perf_counter(); D.pin(at, size); t2 = time.perf_counter()
    print(f"{tag:34s} {size/MIB:6.0f} MiB {threads} threads: touch {t1-t0:.3f} s pin {t2-t1:.3f} s huge {huge()-h:.0f} MiB at {at%(2*MIB)}", flush=True)
    OUT[f"{tag} {size} {threads}"] = (t1 - t0, t2 - t1)
    x = torch.frombuffer(m, dtype=torch.uint8); x._m = m; return x, at
def rate(tag, lanes):
    total = sum(s.numel() for _, _, s in lanes)
    def go():
        for st, d, s in lanes: D.copy(st, d[:s.numel()], s)
    s = time_ns(go, D, [l[0] for l in lanes], repeats=15); OUT[tag] = s.raw
    print(f"   {tag:44s} {total/med(s.raw):6.1f} GB/s [{total/max(s.raw):.1f} {total/min(s.raw):.1f}]", flush=True)
SH, PR = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
for rnd in range(2):
    for tag, fl, adv in (("shared", SH, None), ("private", PR, None), ("private huge", PR, mmap.MADV_HUGEPAGE)):
        x, at = make(tag, 400 * MIB, fl, adv, 8)
        y, z = x[:180 * MIB], x[200 * MIB:380 * MIB]
        rate(f"{tag}: lane 0", [(h0, a0, y)]); rate(f"{tag}: lane 1", [(h1, a1, z)]); rate(f"{tag}: both", [(h0, a0, y), (h1, a1, z)])
        t = time.perf_counter(); D.unpin(at); print(f"   unpinned in {time.perf_counter()-t:.3f} s"); del x, y, z
for tag, fl, adv in (("shared", SH, None), ("private huge", PR, mmap.MADV_HUGEPAGE)):
    for threads in (1, 8):
        x, at = make(tag, 4096 * MIB, fl, adv, threads); D.unpin(at); del x
json.dump(OUT, open(sys.argv[1], "w"))
