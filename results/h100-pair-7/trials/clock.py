"""What makes a network's start longer than its warm run: both in turn, a warm run behind what comes ahead of a start too (arenas filled,
weights copied, answers compared), a start behind a burst of products, and a start's layers with all copies landed."""
import json, statistics, sys, time
from dataclasses import replace
import torch
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search
from sim.simulate import simulate
from calibrate.ways import cut
out, root, N, *names = sys.argv[1:]
cpu = "cpu" in names; names = [n for n in names if n != "cpu"]
med = statistics.median; D = open_device("cpu" if cpu else "cuda"); record = {}
host = read_host(f"{root}/hosts/{N}.yaml")
where = D.torch_device(0)
try:
    import pynvml; pynvml.nvmlInit(); handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    clock = lambda: (pynvml.nvmlDeviceGetClockInfo(handle, 1), pynvml.nvmlDeviceGetClockInfo(handle, 2), pynvml.nvmlDeviceGetPowerUsage(handle) // 1000, pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
except Exception as e: clock = lambda: None
A = torch.randn(64 if cpu else 4096, 64 if cpu else 4096, device=where); Y = torch.empty_like(A)
for name in names:
    m, d, file = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"{root}/profiles/{N}/{file}.yaml"); built = build(m, dtype=d); given = built.inputs_on(where)
    plans = {"1": search(p, host, Options(partners=())).best.plan, "2": search(p, host, Options()).best.plan, "cut": cut(p.network)}
    colds = {k: prepare(built.module if k == "1" else build(m, dtype=d).module, q, built.inputs, network=p.network, host=host, device=D) for k, q in plans.items()}
    scratch = torch.empty(p.network.total_bytes if hasattr(p.network, "total_bytes") else 2**29, dtype=torch.uint8, device=where)
    def fill(): scratch.fill_(255)
    def burst():
        for _ in range(8): torch.mm(A, A, out=Y)
    c1, c2, cc = colds["1"], colds["2"], colds["cut"]
    def spin(s):
        t = time.perf_counter()
        while time.perf_counter() - t < s: pass
    ways = {
        "warm": (lambda: None, c1.resident), "warm behind a fill": (fill, c1.resident), "warm behind a burst": (burst, c1.resident),
        "warm behind evict and copies": (lambda: (c1.evict(), c1._fill()), c1.resident), "warm 5 ms later": (lambda: (D.synchronize(), spin(5e-3)), c1.resident),
        "cold": (c1.evict, c1), "cold behind a burst": (lambda: (c1.evict(), burst()), c1), "cold 5 ms later": (lambda: (c1.evict(), D.synchronize(), spin(5e-3)), c1),
        "2 links": (c2.evict, c2), "2 links behind a burst": (lambda: (c2.evict(), burst()), c2),
        "cut warm": (lambda: None, cc.resident), "cut landed": (lambda: None, cc.landed), "cut cold": (cc.evict, cc)}
    took = {}; ok = []
    with steady(D), torch.no_grad():
        ref = kept(c1.resident(*given)); wake(c1, given); cc.resident(*given); D.synchronize(); cc(*given); D.synchronize()
        for r in range(4 if cpu else 16):
            for w, (ahead, call) in ways.items():
                if w == "cut landed" and not (cc._hot or cc._full): cc(*given)
                def one():
                    ahead(); D.synchronize()
                    a = time.perf_counter_ns(); y = call(*given); i = time.perf_counter_ns() - a; D.wait_for_caller(0); t = time.perf_counter_ns() - a
                    D.synchronize(); ok.append(likeness(y, ref).bit_equal); return t, i
                if w.startswith("warm") and not c1._full: c1._fill(); D.synchronize()
                try: x = once_at_full_pace(one, D)
                except Exception as e: x = None; print(w, type(e).__name__, str(e)[:150]) if not r else None
                if r and x: took.setdefault(w, []).append(x)
            if r in (1, 8, 15): print("   clocks (SM, memory MHz), W, why:", clock(), flush=True)
        alone = c1.copies_alone()
    record[f"{m} {d}"] = took
    s = simulate(c1.program, p), simulate(c2.program, p)
    print(f"{m} {d}: predicted {s[0].makespan_ns/1e3:.0f} and {s[1].makespan_ns/1e3:.0f} us, warm by profile {sum(l.resident.median_ns for l in p.layers)/1e3:.0f}; copies alone {med(alone.raw)/1e3:.0f}; right {all(ok)}", flush=True)
    for w, v in took.items(): print(f"   {w:30} {med(t for t, _ in v)/1e3:8.1f} us ({min(t for t, _ in v)/1e3:.1f} to {max(t for t, _ in v)/1e3:.1f}), issued {med(i for _, i in v)/1e3:.0f}", flush=True)
    for c in colds.values(): c.close()
json.dump(record, open(out, "w"))
