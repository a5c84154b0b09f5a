"""What a pause does to the next call: of the host, of the GPU, of NVLink."""
import os, sys, time, json, statistics
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
import torch, torchvision
from hwexec.cuda import CudaDevice
from hwexec.arena import HostArena
from hwexec.timing import steady
D = CudaDevice(); MIB = 1 << 20
med = statistics.median
torch.set_grad_enabled(False)
OUT = {}
host = HostArena(D, 64 * MIB, 0)
a0, a1 = D.allocate(64 * MIB, 0), D.allocate(64 * MIB, 1)
D.connect(1, 0); D.connect(0, 1)
p0 = D.view(a0, 1, a0)
comp = D.stream("compute:0", 0); h0 = D.stream("h2d:0", 0); push = D.stream("p2p:1>0", 1)
clock = time.perf_counter_ns
model = torchvision.models.resnet50().eval().cuda(); x = torch.randn(1, 3, 224, 224, device="cuda")
with torch.cuda.stream(comp.raw):
    for _ in range(3): model(x)
D.synchronize()
with D.capture(comp) as big: y = model(x)
one = torch.ones(64, device="cuda")
with torch.cuda.stream(comp.raw): one.add_(1)
with D.capture(comp) as small: one.add_(1)
copy = D.ready_copy(h0, a0[:MIB], host.tensor[:MIB]); tiny = D.ready_copy(h0, a0[-4096:], host.tensor[-4096:])
ev = D.event(); record = D.ready_record(h0, ev)

def spin(s):
    end = clock() + s * 1e9
    while clock() < end: pass
def beat(s, call, every=2e-4):
    end = clock() + s * 1e9
    while clock() < end: call(); D.synchronize(); spin(every)
def nothing(): pass
def poison(): a0.fill_(255); a1.fill_(255)
def compare(): torch.equal(a0[:1024], a0[1024:2048])
big_r, small_r = big.replay, small.replay
acts = {"copy": copy, "big graph": big_r, "small graph": small_r}
def row(name, act, before, pause, n=12, first=None):
    calls, totals, firsts = [], [], []
    with D.on(comp):
        for i in range(n + 2):
            before(); D.synchronize(); pause()
            a = clock()
            if first: first()
            f = clock()
            act()
            b = clock(); D.synchronize(); c = clock()
            if i > 1: calls.append((b - f) / 1e3); totals.append((c - a) / 1e3); firsts.append((f - a) / 1e3)
    OUT[name] = [calls, totals, firsts]
    print(f"{name:70s} first {med(firsts):7.1f} call {med(calls):7.1f} [{min(calls):6.1f} {max(calls):7.1f}] total {med(totals):7.1f} [{min(totals):7.1f} {max(totals):7.1f}]", flush=True)

def pauses():
    for label in ("big graph", "copy", "small graph"):
        for pname, before in (("nothing", nothing), ("poison", poison)):
            for s in (0, 2e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1):
                row(f"{label} after {pname}, spin {s*1e3:g} ms", acts[label], before, lambda: spin(s) if s else None)
        for s in (1e-3, 1e-2, 1e-1):
            row(f"{label} after poison, sleep {s*1e3:g} ms", acts[label], poison, lambda: time.sleep(s))
def beats():
    for label in ("big graph", "copy"):
        for bname, call in (("kernel", lambda: one.add_(1)), ("copy", tiny), ("small graph", small_r)):
            for every in (2e-4, 2e-3):
                row(f"{label} after poison, beats of {bname} every {every*1e3:g} ms for 30 ms", acts[label], poison, lambda: beat(3e-2, call, every))
        for fname, first in (("tiny copy", tiny), ("small graph", small_r), ("record", record), ("kernel", lambda: one.add_(1))):
            row(f"{label} right after {fname}, after poison and spin 10 ms", acts[label], poison, lambda: spin(1e-2), first=first)
def ramp():
    size = 2 * MIB
    for pause in (0, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 1e-1):
        rows = []
        for r in range(5):
            for k in range(20): D.copy(push, p0[:size], a1[:size])
            D.synchronize(); spin(pause)
            es = [D.event(timing=True) for _ in range(161)]
            D.gate(push, 2e5) if pause == 0 else None
            D.record(push, es[0])
            for k in range(160): D.copy(push, p0[:size], a1[:size]); D.record(push, es[k + 1])
            D.synchronize()
            rows.append([D.elapsed_ns(es[k], es[k + 1]) / 1e3 for k in range(160)])
        m = [med(c) for c in zip(*rows)]
        OUT[f"ramp {pause}"] = rows
        at, s = [], 0
        for k, v in enumerate(m):
            s += v
            if k in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 159): at.append(f"{s:.0f}us:{v:.1f}")
        print(f"pushes of 2 MiB after {pause*1e3:g} ms: " + " ".join(at), flush=True)
    # of 38 MiB, after 0.05 s, with a train of small pushes meanwhile
    for train in (0, 4, 16, 64):
      for each in (64 << 10, MIB):
        rows = []
        for r in range(5):
            D.synchronize(); spin(0.05)
            b, e = D.event(timing=True), D.event(timing=True)
            for k in range(train): D.copy(push, p0[:each], a1[:each])
            D.gate(push, 3e5)
            D.record(push, b); D.copy(push, p0[:38*MIB], a1[:38*MIB]); D.record(push, e); D.synchronize()
            rows.append(D.elapsed_ns(b, e) / 1e3)
        print(f"38 MiB 300 us after {train} pushes of {each>>10} KiB: {med(rows):.1f} {min(rows):.1f}")
with steady(D):
    for part in sys.argv[2:] or ["pauses", "beats", "ramp"]:
        t = time.time(); print("==", part); globals()[part](); print("--", part, f"{time.time()-t:.1f} s")
json.dump(OUT, open(sys.argv[1], "w"))
