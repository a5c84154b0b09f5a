"""Why layers of a cold start over two links take longer than warm ones: the same kernels alone, behind copies that have landed, beside
copies over each lane, and in a cold start. Times without the profiler first, then kernel by kernel."""
import json, statistics, sys, time
from dataclasses import replace
from functools import partial
import numpy as np
import torch
from hwexec.core import steady, at_full_pace
from hwexec.preparing import prepare, open_device
from hwexec.script import do
from hwexec.starts import kept, likeness, wake
from hwexec.timing import time_ns
from sim.catalog import Request, find_profile
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search

D = open_device("cuda"); med = statistics.median
out, models = sys.argv[1], sys.argv[2:]
host = read_host("scenarios/hosts/h100-pair.yaml")
def us(x): return f"{x/1e3:.1f}"
record = {}
W = []
for name in models:
    m, d, file = name.split(":")[-3:] if name.count(":") == 2 else None
    m = m.replace("@", "hf:")
    p = read_profile(f"scenarios/profiles/h100-pair/{file}.yaml"); built = build(m, dtype=d)
    given = built.inputs_on(torch.device("cuda", 0))
    two = search(p, host, Options()).best.plan
    two = replace(two, head=len(two.chunks))
    rec = record[name] = {"chunks": len(two.chunks), "opening": two.opening}
    cold = prepare(built.module, two, built.inputs, network=p.network, host=host, device=D)
    with steady(D):
        ref = kept(cold.resident(*given)); wake(cold, given)
        c, head, res = cold._graphs["cold"], cold._graphs["cold"].head, cold._graphs["resident"]
        def wall(before, call):
            def sample():
                before(); D.synchronize(); a = time.perf_counter_ns(); call(); D.synchronize(); return time.perf_counter_ns() - a
            sample(); return at_full_pace(sample, D, 9).kept if False else [sample() for _ in range(9)]
        def fill(): cold.evict(); cold._fill(); D.synchronize()
        def parts():
            with D.on(cold._stage.compute):
                c.graph.replay()
                if head.opened: c.graph.replay(1)
        def land(): cold.evict(); do(head.copies); do(head.later); D.synchronize()
        rec["loop"] = wall(lambda: None, lambda: cold.resident(*given))
        rec["warm"] = wall(fill, lambda: cold.resident(*given))
        rec["landed"] = wall(land, parts)
        rec["cold"] = wall(cold.evict, lambda: cold(*given))
        rec["right"] = likeness(cold(*given), ref).bit_equal
        # gated: the resident graph beside copies, all enqueued beforehand
        st = D.stream("calibrate", 0)
        moves = list(cold._stage.copies()); S = cold._stage.streams
        own = [mv.issue for op, mv in moves if op.stream == "h2d:0"]
        ins = {op.chunk: mv for op, mv in moves if op.stream.startswith("h2d:1")}
        pushes = {op.chunk: mv for op, mv in moves if op.source is not None}
        pairs = [(ins[k], pushes[k], D.event()) for k in pushes]
        sp, si = S["p2p:1>0"], S["h2d:1"]
        ro, rp = (D.ready_record(S["h2d:0"], e0 := D.event()), D.ready_record(sp, e1 := D.event()))
        def issue_own(first):
            for i, f in enumerate(own):
                f()
                if first and i == 0: D.record(S["h2d:0"], e0)
        def issue_push(first):
            for i, (a, b, e) in enumerate(pairs):
                a.issue(); D.record(si, e); D.wait(sp, e); b.issue()
                if first and i == 0: D.record(sp, e1)
        def beside(lanes):
            start, stop = D.event(timing=True), D.event(timing=True)
            ends = {}
            def work():
                for k in range(3):
                    if "o" in lanes: issue_own(k == 0)
                    if "p" in lanes: issue_push(k == 0)
                if "o" in lanes: D.wait(st, e0)
                if "p" in lanes: D.wait(st, e1)
                D.record(st, start)
                with D.on(st): res.graph.replay()
                D.record(st, stop)
            found = []
            for _ in range(7):
                s = time_ns(work, D, [st, *S.values()], repeats=1, warmup=0); found.append((D.elapsed_ns(start, stop), s.raw[0]))
            return [f for f, _ in found[1:]]
        with torch.no_grad():
            for lanes in ("", "o", "p", "op", "", "o", "p", "op"):
                rec.setdefault(f"gated {lanes or 'alone'}", []).extend(beside(lanes))
        D.close_stream(st)
    base = med(rec["gated alone"])
    print(name, "chunks", rec["chunks"], "opening", rec["opening"], "right", rec["right"], {k: us(med(v)) for k, v in rec.items() if isinstance(v, list)}, {k: f"{med(v)/base-1:+.1%}" for k, v in rec.items() if k.startswith("gated ")}, flush=True)
    W.append((name, cold, given, c, head, res, fill, land, parts))
    # only one network in memory at a time would lose the profiler order: all stay
def kernels(acts):
    ks = [a for a in acts if a.kind == "kernel" and a.gpu == 0]
    cs = [(a.kind, a.gpu, a.start_ns, a.stop_ns) for a in acts if a.kind in ("h2d", "d2d")]
    return ks, cs
for name, cold, given, c, head, res, fill, land, parts in W:
    rec = record[name]
    def start():
        do(head.copies)
        with D.on(cold._stage.compute):
            c.start(lambda: None, ahead=True)
    def play():
        with D.on(cold._stage.compute): res.graph.replay()
    def both():
        do(head.copies); do(head.later); play()
    ways = {"loop": (lambda: None, play), "warm": (fill, play), "landed": (land, parts), "cold": (cold.evict, start), "beside both": (fill, both)}
    rows = {}
    for k in range(6):
        for way, (before, call) in ways.items():
            before(); D.synchronize()
            ks, cs = kernels(D.trace(call)); rows.setdefault(way, []).append((ks, cs))
    n = min(len(r[0]) for v in rows.values() for r in v)
    print(name, "kernels", {w: sorted({len(r[0]) for r in v}) for w, v in rows.items()})
    dur = {w: np.median([[k.stop_ns - k.start_ns for k in ks[:n]] for ks, _ in v], axis=0) for w, v in rows.items()}
    gap = {w: np.median([[max(-5e3, min(2e4, b.start_ns - a.stop_ns)) for a, b in zip(ks[:n], ks[1:n])] for ks, _ in v], axis=0) for w, v in rows.items()}
    rec["names"] = [k.name[:60] for k in rows["loop"][0][0][:n]]
    rec["kernels"] = {w: [[round(k.start_ns - ks[0].start_ns) for k in ks] for ks, _ in v[:3]] for w, v in rows.items()}
    rec["durations"] = {w: [round(float(x)) for x in v] for w, v in dur.items()}
    rec["gaps"] = {w: [round(float(x)) for x in v] for w, v in gap.items()}
    rec["copies"] = {w: [[(a, b, round(x - ks[0].start_ns), round(y - ks[0].start_ns)) for a, b, x, y in cs] for ks, cs in v[:3]] for w, v in rows.items()}
    print("   durations us", {w: us(v.sum()) for w, v in dur.items()}, "gaps us", {w: us(v.sum()) for w, v in gap.items()}, "span", {w: us(med([ks[n-1].stop_ns - ks[0].start_ns for ks, _ in v])) for w, v in rows.items()})
    for w in ("landed", "cold", "beside both"):
        more = dur[w] - dur["loop"]; top = np.argsort(-more)[:8]
        q = [f"{more[i::1][0]/1e3:.1f}" for i in ()]
        fifths = [f"{x.sum()/1e3:.1f}" for x in np.array_split(more, 5)]
        gf = [f"{x.sum()/1e3:.1f}" for x in np.array_split(gap[w] - gap["loop"], 5)]
        print(f"   {w}: more by fifths {fifths} gaps {gf} top", [(int(i), rec['names'][i][:28], us(dur["loop"][i]), us(dur[w][i])) for i in top[:5]])
    cold.close()
json.dump(record, open(out, "w"))
