"""How a shared core's pace goes: after a move, over time, and beside starts."""
import json, os, statistics, sys, time, gc
import torch
from hwexec.preparing import open_device, prepare
from sim.baselines import BASELINES, Setting
from sim.catalog import find_host, find_profile, Request
from sim.models import build
from sim.search import Options, search
D = open_device("cuda"); med = statistics.median; OUT = {}
torch.zeros(1 << 20).add_(1)
gc.disable(); torch.set_grad_enabled(False)
def loop(n=2000):
    a = time.perf_counter_ns()
    for _ in range(n): pass
    return (time.perf_counter_ns() - a) / n
cores = sorted(os.sched_getaffinity(0))
print("== after a move, ns per loop, medians of stretches of 2, 5, 10, 25, 50, 100, 200, 400 ms")
OUT["moves"] = {}
for c in cores[::2]:
    os.sched_setaffinity(0, {c}); t0 = time.perf_counter(); rows = []
    while (t := time.perf_counter() - t0) < .6: rows.append((t, loop()))
    OUT["moves"][c] = rows
    cuts = [0, .002, .005, .01, .025, .05, .1, .2, .4, .6]
    print(f"{c:2d} " + " ".join(f"{med([v for t, v in rows if a <= t < b] or [0]):5.1f}" for a, b in zip(cuts, cuts[1:])), flush=True)
print("== two seconds on a core, by 50 ms: median (10th, 90th)")
for c in cores[:4]:
    os.sched_setaffinity(0, {c}); t0 = time.perf_counter(); rows = []
    while (t := time.perf_counter() - t0) < 2: rows.append((t, loop()))
    OUT[f"long {c}"] = rows
    print(c, " ".join(f"{med([v for t, v in rows if k*.05 <= t < k*.05+.05]):.0f}" for k in range(40)), flush=True)
host = find_host("h100-pair")
p = find_profile(host, Request("convnext_base", None, "bf16", None))
def make(plan):
    built = build("convnext_base", dtype="bf16"); given = built.inputs_on(torch.device("cuda", 0))
    return prepare(built.module, plan, given, network=p.network, host=host, device=D), given
two = search(p, host, Options()).best
eager = next(b for b in BASELINES if b.name == "pipeswitch").make(Setting(p, host, 0, 1))
g, gi = make(two.plan); e, ei = make(eager)
def starts(cold, given, n):
    rows = []
    for _ in range(n):
        cold.evict(); D.synchronize()
        a = time.perf_counter_ns(); cold(*given); b = time.perf_counter_ns(); D.synchronize(); z = time.perf_counter_ns()
        l = loop(1000), loop(1000), loop(1000)
        rows.append((b - a, z - a, *l))
    return rows
for c in cores[8:14]:
    os.sched_setaffinity(0, {c}); t0 = time.perf_counter()
    while time.perf_counter() - t0 < .25: loop()
    rows = starts(g, gi, 150); OUT[f"graph {c}"] = rows; er = starts(e, ei, 40); OUT[f"eager {c}"] = er
    for name, rs in (("graph", rows), ("eager", er)):
        rs = rs[1:]; best = min(min(r[2:]) for r in rs)
        out = []
        for lo, hi in ((0, 13.5), (13.5, 16), (16, 20), (20, 26), (26, 99)):
            sel = [r for r in rs if lo <= med(r[2:]) < hi]
            out.append(f"<{hi:g}: {len(sel):3d} " + (f"{med([r[0] for r in sel])/1e3:6.0f} {med([r[1] for r in sel])/1e3:6.0f}" if sel else "   -      -  "))
        print(f"{c} {name} best loop {best:.1f}: n, issued, total by pace after: " + " | ".join(out), flush=True)
json.dump(OUT, open(sys.argv[1], "w"))
