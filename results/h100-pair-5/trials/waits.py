"""What a wait costs a chain of kernels that comes to it long after its event, while the same streams go on bringing weights: in one graph
with the copies, and in one behind them; waits for copies to this GPU, and for pushes of another."""
import json, statistics, sys
from types import SimpleNamespace
import torch
from calibrate.bench import Bench, QUICK, MIB
from calibrate.overheads import Chain, SMALL, SHORT, KERNEL_BYTES
from hwexec import core
from hwexec.device import forked
from hwexec.preparing import open_device
D = open_device("cuda"); med = statistics.median
b = Bench(D, SimpleNamespace(gpus=2), QUICK); N, LEAD, BIG, PUSHES = 48, 24, 24, 24
S = {n: b.stream(n, g) for n, g in (("h2d:0", 0), ("h2d:1", 1), ("p2p:1>0", 1), ("land:0:x", 0))}
pt, pf, to, src = b.pushed_view(1, 0), b.filled(1), b.arena(0), b.host.tensor
to1 = b.arena(1)
small = [slice(k * SMALL, (k + 1) * SMALL) for k in range(N)]
big = [slice((16 + 4 * k) * MIB, (20 + 4 * k) * MIB) for k in range(24)]
R = {"own": [D.ready_copy(S["h2d:0"], to[s], src[s]) for s in small], "push": [D.ready_copy(S["p2p:1>0"], pt[s], pf[s]) for s in small]}
B0 = [D.ready_copy(S["h2d:0"], to[s], src[s]) for s in big]
B1 = [(D.ready_copy(S["h2d:1"], to1[s], src[s]), D.ready_copy(S["p2p:1>0"], pt[s], pf[s])) for s in big]
T0, T1 = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
A, W = torch.randn(384, 1024, device="cuda"), torch.randn(1024, 1024, device="cuda")
Y = torch.empty(384, 1024, device="cuda")
def gemm(): torch.mm(A, W, out=Y)
record = []
class P:
    pass
def kernels():
    s, l = Chain(b, SHORT), Chain(b, KERNEL_BYTES)
    return {"short": s.kernel, "10 us": l.kernel, "product": gemm}
C = b.stream("compute:0", 0)
for f in kernels().values():
    with D.on(C): f()
D.synchronize()
def bring(kind, back, events, land, graph):
    stream = "h2d:0" if kind == "own" else "p2p:1>0"
    for k in range(N):
        R[kind][k](); D.record(S[stream], events[k])
        if land and kind == "push": D.wait(S["land:0:x"], events[k]); D.record(S["land:0:x"], land[k])
    if back in ("own lane", "both"):
        for c in B0: c()
    if back in ("partner", "both"):
        for c, p in B1:
            e = D.event(); c(); D.record(S["h2d:1"], e); D.wait(S["p2p:1>0"], e); p()
for words, kernel in kernels().items():
    for how in ("graph", "ahead"):
        for kind in ("own", "push"):
            for back in ("nothing", "own lane", "partner", "both"):
                took, keep = {}, []
                for waited in (0, N // 2, N):
                    ev, ld = [D.event() for _ in range(N)], [D.event() for _ in range(N)]
                    if how == "ahead": bring(kind, "nothing", ev, ld, False); D.synchronize()
                    with D.capture(C) as g:
                        with forked(D, C, list(S.values())[:3] if how == "graph" else []), D.on(C):
                            if how == "graph": bring(kind, back, ev, None, True)
                            for at in range(-LEAD * (1 if words != "short" else 6), N):
                                if at == 0: T0.record(C.raw)
                                if waited and at >= 0 and at % (N // waited) == 0:
                                    if how == "graph": D.wait(C, ev[at])
                                    else: D.wait_outside(C, ld[at] if kind == "push" else ev[at])
                                kernel()
                            T1.record(C.raw)
                    keep.append((waited, g, ev, ld))
                with core.steady(D):
                    for r in range(8):
                        for waited, g, ev, ld in keep:
                            D.synchronize()
                            if how == "ahead": bring(kind, back, ev, ld, False)
                            with D.on(C): g.replay()
                            D.synchronize()
                            if r: took.setdefault(waited, []).append(T0.elapsed_time(T1) * 1e6)
                for _, g, _, _ in keep: g.close()
                record.append({"kernels": words, "how": how, "kind": kind, "back": back, "took": took})
                print(f"{words:8} {how:6} {kind:5} beside {back:9} {med(took[0])/1e3:7.1f} us, a wait {(med(took[N//2])-med(took[0]))/(N//2)/1e3:6.2f} {(med(took[N])-med(took[0]))/N/1e3:6.2f}", flush=True)
json.dump(record, open(sys.argv[1], "w"))
