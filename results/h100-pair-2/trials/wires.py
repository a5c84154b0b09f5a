"""What a split graph, waits that block, and a sleeping NVLink cost. Two GPUs."""
import os, sys, time, json, statistics, ctypes
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
import torch, torchvision
from functools import partial
from hwexec.cuda import CudaDevice
from hwexec.arena import HostArena
from hwexec.device import forked
from hwexec.timing import steady, time_ns, wall_ns, call_ns, at_pace
D = CudaDevice(); MIB = 1 << 20
med = statistics.median
torch.set_grad_enabled(False)
OUT = {}
host = HostArena(D, 256 * MIB, 0)
a0, a1 = D.allocate(256 * MIB, 0), D.allocate(256 * MIB, 1)
D.connect(1, 0); D.connect(0, 1)
p0 = D.view(a0, 1, a0)  # target's arena as GPU 1's
comp = D.stream("compute:0", 0); h0 = D.stream("h2d:0", 0); h1 = D.stream("h2d:1", 1); push = D.stream("p2p:1>0", 1); side = D.stream("side", 0)
tiny = torch.ones(64, device="cuda:0")

def rec(s):
    e = D.event(); D.record(s, e); return e
def handoff(a, b):
    D.wait(b, rec(a))

def show(name, samples, per=1.0, minus=0.0):
    v = [(x / 1e3 - minus) / per for x in samples]
    OUT[name] = v
    print(f"{name:54s} med {med(v):8.2f} min {min(v):8.2f} max {max(v):8.2f}")
    return med(v)

def measure(name, enqueue, streams, per=1.0, graph=True, minus=0.0):
    if graph:
        with D.capture(streams[0]) as g:
            with forked(D, streams[0], streams[1:]):
                enqueue()
        s = time_ns(g.replay, D, [streams[0]], repeats=15)
        r = show(name + " graph", s.raw, per, minus); g.close()
        return r
    s = time_ns(enqueue, D, streams, repeats=15)
    return show(name + " stream", s.raw, per, minus)

# --- chains
N = 16
def chunk(i, size): return slice((i % 16) * size, (i % 16 + 1) * size)
def h2d0(i, size): D.copy(h0, a0[chunk(i, size)], host.tensor[chunk(i, size)])
def h2d1(i, size, s=None): D.copy(s or h1, a1[chunk(i, size)], host.tensor[chunk(i, size)])
def pushes(i, size, s=None): D.copy(s or push, p0[chunk(i, size)], a1[chunk(i, size)])
def kernel():
    with torch.cuda.stream(comp.raw): tiny.add_(1)

def chains(size, graph):
    tag = f"{size/MIB:g}M"
    def alone(f):
        def run():
            for i in range(N): f(i)
        return run
    def c_hp():
        for i in range(N):
            h2d1(i, size); handoff(h1, push); pushes(i, size)
            if i < N - 1: handoff(push, h1)
    def c_hp_same():
        for i in range(N):
            h2d1(i, size); pushes(i, size, h1)
    def c_hk():
        for i in range(N):
            h2d0(i, size); handoff(h0, comp); kernel()
            if i < N - 1: handoff(comp, h0)
    def c_pk():
        for i in range(N):
            pushes(i, size); handoff(push, comp); kernel()
            if i < N - 1: handoff(comp, push)
    def c_hpk():
        for i in range(N):
            h2d1(i, size); handoff(h1, push); pushes(i, size); handoff(push, comp); kernel()
            if i < N - 1: handoff(comp, h1)
    h = measure(f"{tag} h2d0 alone", alone(lambda i: h2d0(i, size)), [h0], N, graph)
    h1_ = measure(f"{tag} h2d1 alone", alone(lambda i: h2d1(i, size)), [h1], N, graph)
    p = measure(f"{tag} push alone", alone(lambda i: pushes(i, size)), [push], N, graph)
    k = measure(f"{tag} kernel alone", alone(lambda i: kernel()), [comp], N, graph)
    for name, f, streams, own in (("h2d>push>", c_hp, [h1, push], h1_ + p), ("h2d>push same stream>", c_hp_same, [h1], h1_ + p),
                             ("h2d0>kernel>", c_hk, [comp, h0], h + k), ("push>kernel>", c_pk, [comp, push], p + k),
                             ("h2d>push>kernel>", c_hpk, [comp, h1, push], h1_ + p + k)):
        got = measure(f"{tag} {name}", f, streams, N, graph)
        print(f"      beyond its parts, a round: {got - own:6.2f}")
        OUT[f"{tag} {name} beyond {'graph' if graph else 'stream'}"] = got - own

# --- a push from sleep
def asleep():
    size = 38 * MIB
    for pause in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5):
        for wake in (None, "push 4K at once", "read 4K at once"):
            rows = []
            for _ in range(4 if pause > .1 else 5):
                D.synchronize(); time.sleep(pause); at_pace()
                b, m, e = (D.event(timing=True) for _ in range(3))
                if wake and wake.startswith("push"):
                    D.copy(push, p0[:4096], a1[:4096])
                elif wake:
                    D.copy(comp, a0[:4096], D.view(a1, 0, a1)[:4096])
                D.copy(h1, a1[:size], host.tensor[:size])
                handoff(h1, push)
                D.record(push, b); D.copy(push, p0[:size], a1[:size]); D.record(push, e)
                D.synchronize()
                rows.append(D.elapsed_ns(b, e))
            show(f"push 38M after {pause} s, wake {wake}", rows)
    # how long a wake takes: the 4K push itself
    for pause in (0.0, 0.5):
        rows = []
        for _ in range(5):
            D.synchronize(); time.sleep(pause)
            b, e = (D.event(timing=True) for _ in range(2))
            D.record(push, b); D.copy(push, p0[:4096], a1[:4096]); D.record(push, e); D.synchronize()
            rows.append(D.elapsed_ns(b, e))
        show(f"push 4K after {pause} s", rows)
    # both, one soon after the other
    for gap_us in (0, 50, 150, 300):
        rows = []
        for _ in range(4):
            D.synchronize(); time.sleep(0.5)
            b, e = (D.event(timing=True) for _ in range(2))
            D.copy(push, p0[:4096], a1[:4096])
            D.gate(push, gap_us * 1e3)
            D.record(push, b); D.copy(push, p0[:size], a1[:size]); D.record(push, e); D.synchronize()
            rows.append(D.elapsed_ns(b, e))
        show(f"push 38M, a 4K one {gap_us} us before, after 0.5 s", rows)

# --- a split graph
def split(name, dtype, parts):
    model = getattr(torchvision.models, name)().eval().to("cuda:0", dtype)
    x = torch.randn(1, 3, 224, 224, device="cuda:0", dtype=dtype)
    seqs = {"resnet50": lambda m: [m.conv1, m.bn1, m.relu, m.maxpool, *m.layer1, *m.layer2, *m.layer3, *m.layer4, m.avgpool, torch.nn.Flatten(1), m.fc],
            "convnext_base": lambda m: [*[b for s in m.features for b in (s if isinstance(s, torch.nn.Sequential) else [s])], m.avgpool, m.classifier]}[name](model)
    def run(a, b, y):
        for s in seqs[a:b]: y = s(y)
        return y
    with torch.cuda.stream(comp.raw):
        for _ in range(3): ref = run(0, len(seqs), x)
    D.synchronize(); ref = ref.clone()
    outside = D.event(); D.record(comp, outside); D.synchronize()
    def cap(a, b, y, pool, wait=False):
        g = torch.cuda.CUDAGraph()
        with torch.cuda.stream(comp.raw):
            g.capture_begin(pool=pool, capture_error_mode="thread_local")
            if wait: D.wait_outside(comp, outside)
            y = run(a, b, y)
            g.capture_end()
        return g, y
    D.synchronize()
    whole, yw = cap(0, len(seqs), x, torch.cuda.graph_pool_handle())
    graphs = {}
    for p in parts:
        pool = torch.cuda.graph_pool_handle()
        g1, y1 = cap(0, p, x, pool); g2, y2 = cap(p, len(seqs), y1, pool); 
        g3, y3 = cap(p, len(seqs), y1, pool, wait=True)
        graphs[p] = (g1, g2, y2, g3, y3)
    D.synchronize()
    rec_c = D.ready_record(comp, outside); done = D.event(); rec_s = D.ready_record(side, done); wait_c = D.ready_wait(comp, done)
    def one():
        with D.on(comp): whole.replay()
    def two(p):
        with D.on(comp): graphs[p][0].replay(); graphs[p][1].replay()
    def aside(p):
        with D.on(comp):
            graphs[p][0].replay(); rec_c()
            with torch.cuda.stream(side.raw): graphs[p][3].replay()
            rec_s(); wait_c()
    def poison():
        a0.fill_(255); a1.fill_(255)
    cases = [("whole", one, yw)]
    for p in parts: cases += [(f"split at {p}", partial(two, p), graphs[p][2]), (f"split at {p} aside", partial(aside, p), graphs[p][4])]
    for label, call, y in cases:
        y.zero_(); call(); D.synchronize()
        ok = torch.equal(y, ref)
        tag = f"{name} {str(dtype)[6:]} {label}"
        g = time_ns(call, D, [comp], repeats=15)
        show(tag + " gated", g.raw)
        show(tag + f" from idle, ok {ok}", wall_ns(call, D, repeats=20, before=poison).raw)
        show(tag + " host's calls", call_ns(call, D, repeats=20, before=poison).raw)

with steady(D):
    for part in sys.argv[2:] or ["split", "chains", "asleep"]:
        t = time.time(); print("==", part)
        if part == "split":
            split("resnet50", torch.float32, [5, 7, 9]); split("convnext_base", torch.bfloat16, [3, 6])
        if part == "chains":
            for graph in (True, False):
                for size in (MIB // 4, MIB, 4 * MIB): chains(size, graph)
        if part == "asleep": asleep()
        print("--", part, f"{time.time()-t:.1f} s")
json.dump(OUT, open(sys.argv[1], "w"))
