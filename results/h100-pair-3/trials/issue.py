"""An eager network's issue time as calibrated (resident runs in a loop) and in cold starts, in turn; then published plans by either."""
import json, statistics, sys, time
from dataclasses import replace
import torch
from hwexec import core
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness
from calibrate.layers import _clocked, _issue
from calibrate.ways import everything
from sim.baselines import BASELINES, Setting
from sim.catalog import find_host, find_profile, Request
from sim.models import build
from sim.plan import Access, Chunk, Launch
from sim.program import lower
from sim.simulate import simulate
D = open_device("cuda"); med = statistics.median
torch.set_grad_enabled(False); host = find_host("h100-pair")
def us(x): return f"{x/1e3:.0f}"
for name, dtype in (("convnext_base", "bf16"), ("resnet50", "fp32"), ("hf:bert-base", "bf16")):
    p = find_profile(host, Request(name, None, dtype, None)); built = build(name, dtype=dtype); given = built.inputs_on(torch.device("cuda", 0)); net = p.network
    scratch = D.allocate(64 << 20, 0); s = D.stream("x", 0)
    with core.steady(D):
        found = {}
        def runs(tag, plan, before, how="resident", n=10):
            with prepare(built.module, plan, given, network=net, host=host, device=D) as cold:
                ref = kept(cold.resident(*given)); last = [cold.resident(*given)]
                def one():
                    before(cold, last[0], ref)
                    with _clocked(built.module, everywhere=False) as seen:
                        D.synchronize(); a = time.perf_counter_ns(); last[0] = getattr(cold, how)(*given) if how != "cold" else cold(*given); z = time.perf_counter_ns()
                    D.synchronize(); return seen[-1][1] - seen[0][1], z - a
                one(); x = core.at_full_pace(one, D, n)
                found[tag] = med([q[0] for q in x.kept]); found[tag + " around"] = med([q[1] - q[0] for q in x.kept])
                print(f"{name} {dtype} {tag:42s} modules {us(found[tag])} around {us(found[tag+' around'])} apart {len(x.apart)} {x.full}", flush=True)
        res, cop = everything(net, Access.RESIDENT, launch=Launch.EAGER), replace(everything(net, Access.COPIED, launch=Launch.EAGER), chunks=(Chunk(0, net.arena_bytes, (0,)),))
        nothing = lambda cold, y, ref: None
        def fill(cold, y, ref): likeness(y, ref); D.fill(s, scratch, 255); D.synchronize()
        def evict(cold, y, ref): likeness(y, ref); cold.evict(); D.synchronize()
        def wait3(cold, y, ref):
            likeness(y, ref); D.gate(s, 3e6); D.synchronize()
        for k in range(2):
            runs("A resident, in a loop", res, nothing); runs("A resident, filled", res, fill); runs("A resident, 3 ms waited", res, wait3)
            runs("B cold start, one chunk", cop, evict, "cold")
        prof = sum(l.issue.median_ns for l in p.layers)
        def scaled(by, around):
            ls = tuple(replace(l, issue=replace(l.issue, median_ns=l.issue.median_ns * by, **{})) for l in p.layers)
            return replace(p, layers=ls)
        for b in ("demand", "pipeline", "pipeswitch", "dha", "pt+dha"):
            plan = next(x for x in BASELINES if x.name == b).make(Setting(p, host, 0, 1)); prog = lower(plan, net, host)
            with prepare(built.module, plan, given, network=net, host=host, device=D) as cold:
                ref = kept(cold.resident(*given))
                def one():
                    cold.evict(); D.synchronize(); a = time.perf_counter_ns(); y = cold(*given); z = time.perf_counter_ns(); D.synchronize(); e = time.perf_counter_ns(); likeness(y, ref); return e - a, z - a
                one(); x = core.at_full_pace(one, D, 9)
            m = med([q[0] for q in x.kept]); out = []
            for tag in ("A resident, in a loop", "B cold start, one chunk"):
                try: t = simulate(prog, scaled(found[tag] / prof, 0), detail=False).makespan_ns; out.append(f"{tag[0]} {us(t)} {t/m-1:+.1%}")
                except Exception as e: out.append(repr(e))
            print(f"   {b:10s} measured {us(m)} [{us(min(q[0] for q in x.kept))}] issued {us(med([q[1] for q in x.kept]))} apart {len(x.apart)} {x.full}: " + "  ".join(out), flush=True)
    D.close_stream(s)
