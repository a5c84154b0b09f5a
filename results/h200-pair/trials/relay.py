"""Relays by pull and by push, alone and beside what goes on in a cold start. A trial, kept as it ran; relay.txt is what it printed."""
import os, sys, time, statistics as st
import torch
from hwexec.cuda import CudaDevice
from hwexec.timing import time_ns
from hwexec.arena import HostArena
from hwexec.device import forked, Stream
dev = CudaDevice(); MIB = 2**20; med = st.median
def say(*a): print(*a, flush=True)
torch.set_grad_enabled(False)
G = 512 * MIB
h = HostArena(dev, 2 * G, 0); h.tensor[::4096] = 1
a0 = dev.allocate(G, 0); a1 = dev.allocate(G, 1); dev.connect(1, 0)
v = dev.view(a1, 0, a1)          # GPU1's memory as GPU0 sees it (pull)
w = dev.view(a0, 1, a0)          # GPU0's memory as GPU1 sees it (push)
e0, e1, p, s = dev.stream("h2d:0", 0), dev.stream("h2d:1", 1), dev.stream("p2p:1>0", 0), dev.stream("compute:0", 0)
q = dev.stream("push:1>0", 1)
hp = Stream("pullhigh", 0, torch.cuda.Stream(device=0, priority=-1))
A = torch.randn(1024, 1024, device="cuda:0"); big = torch.randn(16 * MIB, device="cuda:0")
def relay(how, size, own, far, kern, n=12):
    stream = {"pull": p, "push": q, "pullhigh": hp}[how]
    ev = [dev.event(timing=True) for _ in range(n + 1)]
    rows = []
    for _ in range(5):
        dev.synchronize()
        if own:
            for i in range(16): dev.copy(e0, a0[: 8 * MIB], h.tensor[i * 8 * MIB: (i + 1) * 8 * MIB])
        if far:
            for i in range(16): dev.copy(e1, a1[G // 2: G // 2 + 8 * MIB], h.tensor[G + i * 8 * MIB: G + (i + 1) * 8 * MIB])
        if kern:
            with torch.cuda.stream(s.raw):
                for _ in range(150 if kern == "mm" else 80):
                    if kern == "mm": torch.mm(A, A)
                    else: big.add_(1)
        dev.gate(stream, 6e5)
        for i in range(n):
            dev.record(stream, ev[i])
            o = 64 * MIB + i * 16 * MIB
            if how == "push": dev.copy(q, w[o: o + size], a1[o: o + size])
            else: dev.copy(stream, a0[o: o + size], v[o: o + size])
        dev.record(stream, ev[n])
        dev.synchronize()
        rows.append(med([dev.elapsed_ns(ev[i], ev[i + 1]) for i in range(n)]))
    return med(rows) / 1e3
for size in (65536, MIB // 2, 2 * MIB, 8 * MIB, 16 * MIB):
    for how in ("pull", "push", "pullhigh"):
        say(f"relay {how:8s} {size/MIB:7.3f} MiB: " + "  ".join(f"{name} {relay(how, size, *c):7.1f}" for name, c in (
            ("idle", (0, 0, 0)), ("own", (1, 0, 0)), ("far", (0, 1, 0)), ("both", (1, 1, 0)), ("mm", (0, 0, "mm")), ("mem", (0, 0, "mem")), ("both+mm", (1, 1, "mm")), ("both+mem", (1, 1, "mem")))))
# whole shape: N chunks over each lane, relayed by pull or push, kernels behind each, in a graph; total against ideal
def shape(how, S, N, kern, mode, split=1):
    def body():
        lanes = [e0, e1, p if how == "pull" else q]
        with dev.on(s), forked(dev, s, lanes):
            ready = []
            for i in range(N):
                x = slice(2 * i * S, (2 * i + 1) * S); y = slice((2 * i + 1) * S, (2 * i + 2) * S)
                dev.copy(e0, a0[x], h.tensor[x]); ev = dev.event(); dev.record(e0, ev); ready.append(ev)
                dev.copy(e1, a1[y], h.tensor[y]); ev = dev.event(); dev.record(e1, ev)
                r = lanes[2]; dev.wait(r, ev)
                if how == "pull": dev.copy(r, a0[y], v[y])
                else: dev.copy(r, w[y], a1[y])
                ev = dev.event(); dev.record(r, ev); ready.append(ev)
            for ev in ready:
                dev.wait(s, ev)
                for _ in range(kern): torch.mm(A[:512, :512], A[:512, :512], out=C)
    if mode == "graph":
        with dev.capture(s) as g: body()
        t = time_ns(g.replay, dev, [s], repeats=9).median_ns
        got = []
        for _ in range(12):
            dev.synchronize(); t0 = time.perf_counter_ns()
            with dev.on(s): g.replay()
            dev.synchronize(); got.append(time.perf_counter_ns() - t0)
        g.close()
        return t / 1e3, med(got) / 1e3
    t = time_ns(body, dev, [s], repeats=9).median_ns
    return t / 1e3, 0
C = torch.empty(512, 512, device="cuda:0")
with torch.cuda.stream(s.raw):
    for _ in range(50): torch.mm(A[:512, :512], A[:512, :512], out=C)
for S, N in ((MIB // 2, 16), (2 * MIB, 16), (8 * MIB, 16)):
    for kern in (1, 8):
        for how in ("pull", "push"):
            t, wall = shape(how, S, N, kern, "graph"); te, _ = shape(how, S, N, kern, "eager")
            say(f"shape {how} {S/MIB:5.2f} MiB x{N}x2 kern {kern}: graph gated {t:8.1f} wall {wall:8.1f} eager gated {te:8.1f} bytes alone {2*N*S/110.5e3:8.1f}")
# 1. kernel launch alone for reference
with dev.capture(s) as g:
    with dev.on(s):
        for _ in range(128): torch.mm(A[:512, :512], A[:512, :512], out=C)
say("128 kernels gated", time_ns(g.replay, dev, [s], repeats=9).median_ns / 1e3)
h.close()
