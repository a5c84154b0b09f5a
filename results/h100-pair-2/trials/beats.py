"""Beats: how many, of what, from where; and whole starts after a pause, with and without."""
import os, sys, time, json, statistics, threading
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
import torch, torchvision
from hwexec.cuda import CudaDevice
from hwexec.arena import HostArena
from hwexec.timing import steady
from hwexec.executor import prepare
from sim.catalog import find_host, find_profile, Request
from sim.search import search, Options
from sim.models import build
D = CudaDevice(); MIB = 1 << 20
med = statistics.median
torch.set_grad_enabled(False)
OUT = {}
host = HostArena(D, 64 * MIB, 0)
a0, a1 = D.allocate(64 * MIB, 0), D.allocate(64 * MIB, 1)
D.connect(1, 0); D.connect(0, 1)
p0 = D.view(a0, 1, a0)
clock = time.perf_counter_ns
def spin(s):
    end = clock() + s * 1e9
    while clock() < end: pass
class Beat:
    """A tiny copy in, a tiny graph, a push, on streams of its own."""
    def __init__(self, what=("copy", "graph", "push")):
        self.calls = []; self.streams = []
        for gpu, arena in ((0, a0), (1, a1)):
            s = D.stream(f"beat:{gpu}", gpu); one = torch.ones(8, device=f"cuda:{gpu}")
            with torch.cuda.device(gpu), torch.cuda.stream(s.raw): one.add_(1)
            D.synchronize()
            with D.capture(s) as g: one.add_(1)
            self.one, self.g = one, g
            e = D.event(); rec = D.ready_record(s, e)
            if "copy" in what: self.calls.append(D.ready_copy(s, arena[-4096:], host.tensor[-4096:]))
            if "graph" in what: self.calls.append(self.replay(g, s))
            if "push" in what and gpu == 1: self.calls.append(D.ready_copy(s, p0[-65536 * 2:-65536], a1[-65536 * 2:-65536]))
            self.calls.append(rec)
    def replay(self, g, s):
        def go():
            with D.on(s): g.replay()
        return go
    def __call__(self):
        for c in self.calls: c()
        D.synchronize()
class Thread:
    def __init__(self, beat, every, core=None):
        self.beat, self.every, self.stop, self.n = beat, every, False, 0
        self.core = core
        self.t = threading.Thread(target=self.run)
    def run(self):
        if self.core is not None: os.sched_setaffinity(0, {self.core})
        while not self.stop: self.beat(); self.n += 1; time.sleep(self.every)
    def __enter__(self): self.t.start(); return self
    def __exit__(self, *a): self.stop = True; self.t.join()
def poison(): a0.fill_(255); a1.fill_(255)
def row(name, act, pause, n=12, before=poison):
    calls, totals = [], []
    for i in range(n + 2):
        before(); D.synchronize(); pause()
        a = clock(); act(); b = clock(); D.synchronize(); c = clock()
        if i > 1: calls.append((b - a) / 1e3); totals.append((c - a) / 1e3)
    OUT[name] = [calls, totals]
    print(f"{name:84s} call {med(calls):7.1f} [{min(calls):6.1f} {max(calls):7.1f}] total {med(totals):8.1f} [{min(totals):7.1f} {max(totals):7.1f}]", flush=True)

def starts():
    hostd = find_host("h100-pair")
    for m, d in (("resnet50", "fp32"), ("convnext_base", "bf16"), ("hf:bert-base", "bf16")):
        p = find_profile(hostd, Request(m, None, d, None))
        built = build(m, dtype=d)
        dev = built.inputs_on(torch.device("cuda", 0))
        for links, part in ((1, ()), (2, None)):
            o = search(p, hostd, Options(partners=part)).best
            with prepare(built.module, o.plan, dev, network=p.network, host=hostd, device=D) as cold:
                tag = f"{m} {d} {links} links pred {o.makespan_ns/1e3:.0f}"
                go = lambda: cold(*dev)
                row(f"{tag}: no pause", go, lambda: None, before=cold.evict)
                row(f"{tag}: spin 30 ms", go, lambda: spin(.03), before=cold.evict)
                row(f"{tag}: spin 30 ms, 1 beat", go, lambda: (spin(.03), BEAT()), before=cold.evict)
                row(f"{tag}: spin 30 ms, 8 beats", go, lambda: (spin(.03), [BEAT() for _ in range(8)]), before=cold.evict)
                row(f"{tag}: sleep 100 ms", go, lambda: time.sleep(.1), before=cold.evict)
                free = os.sched_getaffinity(0); 
                with Thread(BEAT, 1e-3, core=(min(free) + 3) % os.cpu_count()) as t:
                    row(f"{tag}: sleep 100 ms, another core beats each 1 ms", go, lambda: time.sleep(.1), before=cold.evict)
                    row(f"{tag}: spin 30 ms, another core beats each 1 ms", go, lambda: spin(.03), before=cold.evict)
                row(f"{tag}: spin 30 ms, core beats each 1 ms", go, lambda: [(BEAT(), spin(.001)) for _ in range(25)], before=cold.evict)
                with D.on(cold._stage.compute): pass
                row(f"{tag}: warm no pause", lambda: cold.resident(*dev), lambda: None, before=lambda: None)
                row(f"{tag}: warm sleep 100 ms", lambda: cold.resident(*dev), lambda: time.sleep(.1), before=lambda: None)
def few():
    s = D.stream("h2d:0", 0); copy = D.ready_copy(s, a0[:MIB], host.tensor[:MIB])
    for n in (0, 1, 2, 4, 8, 16):
        row(f"copy, spin 30 ms, {n} beats", copy, lambda: (spin(.03), [BEAT() for _ in range(n)]))
    for what in (("copy",), ("graph",), ("push",)):
        b = Beat(what)
        row(f"copy, spin 30 ms, 8 beats of {what[0]} only", copy, lambda: (spin(.03), [b() for _ in range(8)]))
    ev = D.event(); rec = D.ready_record(s, ev)
    row("copy, spin 30 ms, 8 records", copy, lambda: (spin(.03), [(rec(), D.synchronize()) for _ in range(8)]))
    row("copy, spin 30 ms, 8 synchronize", copy, lambda: (spin(.03), [D.synchronize() for _ in range(8)]))
def wake():
    push = D.stream("p2p:1>0", 1)
    for pname, pause in (("spin 50 ms", lambda: spin(.05)), ("sleep 500 ms", lambda: time.sleep(.5))):
        for n, size in ((0, 0), (1, 4096), (4, 4096), (1, 16384), (1, 65536), (2, 65536), (1, MIB)):
            for wait in (3e5,):
                rows = []
                for r in range(4):
                    D.synchronize(); pause()
                    b, e = D.event(timing=True), D.event(timing=True)
                    for k in range(n): D.copy(push, p0[:size], a1[:size])
                    D.gate(push, wait)
                    D.record(push, b); D.copy(push, p0[:38*MIB], a1[:38*MIB]); D.record(push, e); D.synchronize()
                    rows.append(D.elapsed_ns(b, e) / 1e3)
                OUT[f"wake {pname} {n} {size}"] = rows
                print(f"38 MiB {wait/1e3:.0f} us after {n} pushes of {size} bytes, {pname}: {med(rows):.1f} {min(rows):.1f} {max(rows):.1f}", flush=True)
BEAT = Beat()
with steady(D):
    for part in sys.argv[2:] or ["few", "wake", "starts"]:
        t = time.time(); print("==", part); globals()[part](); print("--", part, f"{time.time()-t:.1f} s")
json.dump(OUT, open(sys.argv[1], "w"))
