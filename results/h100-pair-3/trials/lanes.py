"""Whether both lanes together can carry what each carries alone: by kind of host memory, place and deal of chunks."""
import ctypes, json, mmap, statistics, sys, time
import torch
from functools import partial
from hwexec.cuda import CudaDevice
from hwexec.timing import time_ns
D = CudaDevice(); MIB = 1 << 20; med = statistics.median; OUT = {}
libc = ctypes.CDLL(None, use_errno=True)
h0, h1, push = D.stream("h2d:0", 0), D.stream("h2d:1", 1), D.stream("p2p:1>0", 1)
a0, a1 = D.allocate(512 * MIB, 0), D.allocate(512 * MIB, 1)
D.connect(1, 0); p0 = D.view(a0, 1, a0)
def huge_kb():
    return sum(int(l.split()[1]) for l in open("/proc/self/smaps") if l.startswith("AnonHugePages"))
def pages(size, advice=None):
    size_up = size + 2 * MIB
    m = mmap.mmap(-1, size_up); addr = ctypes.addressof(ctypes.c_char.from_buffer(m))
    at = -(-addr // (2 * MIB)) * 2 * MIB
    if advice is not None:
        r = libc.madvise(ctypes.c_void_p(addr // 4096 * 4096), ctypes.c_size_t(size_up), advice)
        if r: print("madvise failed", ctypes.get_errno())
    before = huge_kb(); t = time.perf_counter()
    ctypes.memset(at, 0, size); t1 = time.perf_counter()
    got = huge_kb() - before
    D.pin(at, size); t2 = time.perf_counter()
    print(f"   {size/MIB:.0f} MiB: huge {got/1024:.0f} MiB, touched in {t1-t:.3f} s, pinned in {t2-t1:.3f} s", flush=True)
    ten = torch.frombuffer(m, dtype=torch.uint8)[at - addr: at - addr + size]
    ten._keep = m
    return ten, at
def rate(tag, lanes, repeats=9):
    """lanes: list of (stream, dst, [src...])"""
    total = sum(s.numel() for _, _, ss in lanes for s in ss)
    def go():
        its = [iter(ss) for _, _, ss in lanes]; offs = [0] * len(lanes); live = list(range(len(lanes)))
        while live:
            for i in list(live):
                s = next(its[i], None)
                if s is None: live.remove(i); continue
                st, dst, _ = lanes[i]
                D.copy(st, dst[offs[i]: offs[i] + s.numel()], s); offs[i] += s.numel()
    s = time_ns(go, D, [l[0] for l in lanes], repeats=repeats)
    r = total / med(s.raw); OUT[tag] = s.raw
    print(f"{tag:52s} {r:6.1f} GB/s  [{total/max(s.raw):.1f} {total/min(s.raw):.1f}]", flush=True)
def both(tag, t):
    n = t.numel() // 2; x, y = t[:n], t[n:]
    rate(f"{tag}: lane 0", [(h0, a0, [x])]); rate(f"{tag}: lane 1", [(h1, a1, [y])])
    rate(f"{tag}: both, halves", [(h0, a0, [x]), (h1, a1, [y])])
    rate(f"{tag}: both, swapped halves", [(h0, a0, [y]), (h1, a1, [x])])
    c = 4 * MIB; parts = [t[i:i + c] for i in range(0, t.numel(), c)]
    rate(f"{tag}: both, 4 MiB in turn", [(h0, a0, parts[::2]), (h1, a1, parts[1::2])])
    c = 16 * MIB; parts = [t[i:i + c] for i in range(0, t.numel(), c)]
    rate(f"{tag}: both, 16 MiB in turn", [(h0, a0, parts[::2]), (h1, a1, parts[1::2])])
    rate(f"{tag}: both, the same bytes", [(h0, a0, [x]), (h1, a1, [x])])
print(open("/sys/kernel/mm/transparent_hugepage/enabled").read().strip())
keep = []
for tag, adv in (("as it is", None), ("no huge", 15), ("huge", 14)):
    t, at = pages(320 * MIB, adv); keep.append((t, at)); both(tag, t)
t = torch.empty(320 * MIB, dtype=torch.uint8, pin_memory=True); both("cudaHostAlloc", t)
x, y = keep[0][0][:160 * MIB], keep[0][0][160 * MIB:]
def relay():
    D.copy(h0, a0[:160 * MIB], x); D.copy(h1, a1[:160 * MIB], y); D.copy(push, p0[160 * MIB:320 * MIB], a1[160 * MIB:320 * MIB])
s = time_ns(relay, D, [h0, h1, push], repeats=9); print(f"both with a push beside: {320*MIB/med(s.raw):.1f}")
for size in (16, 40, 80): rate(f"both, {size} MiB each", [(h0, a0, [x[:size * MIB]]), (h1, a1, [y[:size * MIB]])])
for at in range(0, 3):
    big, addr = pages(2048 * MIB, 14); keep.append((big, addr))
    for off in (0, 1024):
        u, v = big[off * MIB:(off + 160) * MIB], big[(off + 512) * MIB:(off + 672) * MIB]
        rate(f"region {at} + {off} MiB: both", [(h0, a0, [u]), (h1, a1, [v])], 5)
json.dump(OUT, open(sys.argv[1], "w"))
