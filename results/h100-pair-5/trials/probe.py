"""Streams that wait and record, or that a graph is launched on, beside copies over the same GPU's lane: when they come through, by what they
did before."""
import ctypes, json, statistics, sys, time
import torch
from hwexec.core import once_at_full_pace, steady
from hwexec.device import Stream
from hwexec.preparing import open_device
from hwexec.arena import HostArena
med = statistics.median
D = open_device("cuda"); drv = D._driver
MB = 2**20; CH = 8 * MB; N = 24
host = HostArena(D, 512 * MB, 0); a0, a1 = D.allocate(512 * MB, 0), D.allocate(512 * MB, 1)
D.connect(1, 0); view = D.view(a0, 1, a0)
made = []
def new(name, gpu, low=None):
    torch.cuda.set_device(gpu)
    h = ctypes.c_void_p(); assert drv.cuStreamCreate(ctypes.byref(h), 1) == 0
    torch.cuda.set_device(0)
    s = Stream(name, gpu, torch.cuda.ExternalStream(h.value, device=f"cuda:{gpu}")); made.append(s); return s
h0, h1, p = new("h2d:0", 0), new("h2d:1", 1), new("p2p", 1)
def part(t, k, size=CH): return t[k * CH:k * CH + size]
lane = [D.ready_copy(h0, part(a0, k), part(host.tensor, k)) for k in range(N)]
ins = [D.ready_copy(h1, part(a1, k), part(host.tensor, 32 + k)) for k in range(N)]
outs = [D.ready_copy(p, part(view, 32 + k), part(a1, k)) for k in range(N)]
small = torch.zeros(1024, dtype=torch.int32, device="cuda:0")
def kernel(s):
    with D.on(s): small.add_(1)
def h2d(s): D.copy(s, part(a0, 60, 65536), part(host.tensor, 60, 65536))
def d2h(s): D.copy(s, part(host.tensor, 61, 65536), part(a0, 61, 65536))
def d2d(s): D.copy(s, part(a0, 60, 65536), part(a0, 61, 65536))
def fill(s): D.fill(s, part(a0, 62, 65536), 255)
WAYS = {"never used": [], "h2d": [h2d], "kernel": [kernel], "h2d, kernel": [h2d, kernel], "kernel, h2d": [kernel, h2d], "d2h": [d2h], "d2d": [d2d], "fill": [fill], "h2d, fill": [h2d, fill]}
record = {}
def land(L):
    ei, ep, el, e0 = ([D.event() for _ in range(N)] for _ in range(4))
    for s, es in ((h1, ei), (p, ep), (L, el), (h0, e0)): pass
    D.synchronize(); a = time.perf_counter_ns()
    for k in range(N):
        lane[k](); D.record(h0, e0[k])
        ins[k](); D.record(h1, ei[k]); D.wait(p, ei[k]); outs[k](); D.record(p, ep[k]); D.wait(L, ep[k]); D.record(L, el[k])
    marks = {}
    left = {("l", k): el[k] for k in (2, 8, 16, N - 1)} | {("p", k): ep[k] for k in (2, 8, 16, N - 1)} | {("h", N - 1): e0[-1]}
    while left:
        for q in list(left):
            if D.happened(left[q]): marks[q] = (time.perf_counter_ns() - a) / 1e3; del left[q]
    D.synchronize(); return marks
def graph_on(C, g, e0):
    D.synchronize(); a = time.perf_counter_ns()
    for k in range(N):
        lane[k]()
        if k == 0: D.record(h0, e0)
    end, done = D.event(), D.event(); D.record(h0, end)
    with D.on(C): g.replay()
    D.record(C, done); marks = {}
    left = {"done": done, "lane": end}
    while left:
        for q in list(left):
            if D.happened(left[q]): marks[q] = (time.perf_counter_ns() - a) / 1e3; del left[q]
    D.synchronize(); return marks
with steady(D):
    cs = new("compute:cap", 0); kernel(cs); e0 = D.event(); D.record(h0, e0); D.synchronize()
    with D.capture(cs) as g:
        with D.on(cs):
            D.wait_outside(cs, e0); small.add_(1)
    for r in range(2):
        for way, does in WAYS.items():
            L, C = new("land", 0), new("compute:x", 0)
            for s in (L, C):
                for f in does: f(s)
            D.synchronize()
            ms = [land(L) for _ in range(4)][1:]
            gs = [graph_on(C, g, e0) for _ in range(4)][1:]
            record[f"{way} {r}"] = [[(f"{q}", v) for q, v in m.items()] for m in ms + gs]
            print(f"{way:14}", "landings behind their pushes:", *(f"{k}: {med([m['l', k] - m['p', k] for m in ms]):.0f}" for k in (2, 8, 16, N - 1)), f"us, lane done at {med([m['h', N-1] for m in ms]):.0f};  graph behind the first copy done at {med([m['done'] for m in gs]):.0f}, lane at {med([m['lane'] for m in gs]):.0f}", flush=True)
    # as h2d stream first and landing next, many streams: which queues do they share?
    many = [new(f"m{k}", 0) for k in range(40)]
    print("40 streams never used:", [round(med([(m := land(s))["l", 8] - m["p", 8] for _ in range(2)])) for s in many], flush=True)
    for s in many: kernel(s)
    D.synchronize()
    print("40 streams after a kernel:", [round(med([(m := land(s))["l", 8] - m["p", 8] for _ in range(2)])) for s in many], flush=True)
    print("graph on these:", [round(med([graph_on(s, g, e0)["done"] for _ in range(2)])) for s in many], flush=True)
    for s in many: h2d(s)
    D.synchronize()
    print("40 streams after a copy:", [round(med([(m := land(s))["l", 8] - m["p", 8] for _ in range(2)])) for s in many], flush=True)
    print("graph on these:", [round(med([graph_on(s, g, e0)["done"] for _ in range(2)])) for s in many], flush=True)
    # PyTorch's own pool
    pool = [Stream("pool", 0, torch.cuda.Stream(device=0)) for _ in range(34)]
    print("pool:", [hex(s.raw.cuda_stream)[-4:] for s in pool][:3], "again", [hex(s.raw.cuda_stream)[-4:] for s in pool][31:])
    print("34 of PyTorch's:", [round(med([(m := land(s))["l", 8] - m["p", 8] for _ in range(2)])) for s in pool], flush=True)
json.dump(record, open(sys.argv[1], "w"))
