"""Where the host's time goes in eager starts, beside what is predicted: by kind of operation, at the core's full pace."""
import json, statistics, sys, time
from collections import defaultdict
import torch
from hwexec import core
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness
from hwexec.walk import Walk
import hwexec.walk as W
from calibrate.ways import everything
from sim.baselines import BASELINES, Setting
from sim.files import read_host, read_profile
from sim.models import build
from sim.plan import Access, Launch
from sim.program import lower
from sim.ops import Copy, Record, Run, Wait
import sim.simulate as S
D = open_device("cuda"); med = statistics.median; OUT = {}
R, name, dtype, tail = sys.argv[1:5]
host = read_host(f"{R}/hosts/h100-pair.yaml"); p = read_profile(f"{R}/profiles/h100-pair/{name}.{dtype}.{tail}.yaml")
built = build(name, dtype=dtype); given = built.inputs_on(torch.device("cuda", 0))
torch.set_grad_enabled(False)
LOG = []
real = Walk._issue
def logged(self):
    index = self.order[self.cursor]
    a = time.perf_counter_ns(); real(self); LOG.append((index, a, time.perf_counter_ns()))
def us(x): return f"{x/1e3:.0f}"
print("profile start", us(p.start_ns(host.costs)) , "layers issue sum", us(sum(l.issue.median_ns for l in p.layers)), "hook", host.costs.issue_hook_ns.value, "copy", host.costs.issue_copy_ns.value, "event", host.costs.issue_event_ns.value)
with core.steady(D):
    # resident, in a loop and after what a start is preceded by
    plan = everything(p.network, Access.RESIDENT, launch=Launch.EAGER)
    with prepare(built.module, plan, given, network=p.network, host=host, device=D) as cold:
        ref = kept(cold.resident(*given)); scratch = D.allocate(200 << 20, 0); s = D.stream("x", 0)
        def loop():
            D.synchronize(); a = time.perf_counter_ns(); y = cold.resident(*given); b = time.perf_counter_ns(); D.synchronize(); return b - a
        def after_fill():
            D.fill(s, scratch, 255); D.synchronize(); a = time.perf_counter_ns(); y = cold.resident(*given); b = time.perf_counter_ns(); D.synchronize(); likeness(y, ref); return b - a
        def after_evict():
            cold.evict(); D.synchronize(); a = time.perf_counter_ns(); y = cold.resident(*given); b = time.perf_counter_ns(); D.synchronize(); likeness(y, ref); return b - a
        for tag, f in (("resident, in a loop", loop), ("resident, after a fill and a comparison", after_fill), ("resident, after evict", after_evict), ("resident, in a loop", loop)):
            f(); x = core.at_full_pace(f, D, 10); print(f"{tag:44s} {us(med(x.kept))} [{us(min(x.kept))} {us(max(x.kept))}] apart {len(x.apart)} full {x.full}", flush=True)
        bare = lambda: (D.synchronize(), time.perf_counter_ns(), built.module.to(D.torch_device(0)) if False else None)
        D.close_stream(s)
    for b in ("demand", "pipeswitch", "dha", "pt+dha"):
        base = next(x for x in BASELINES if x.name == b); plan = base.make(Setting(p, host, 0, 1))
        prog = lower(plan, p.network, host); sim = S._Simulation(prog, p, True); line = sim.timeline()
        with prepare(built.module, plan, given, network=p.network, host=host, device=D) as cold:
            ref = kept(cold.resident(*given))
            def one(log=False):
                LOG.clear(); cold.evict(); D.synchronize()
                a = time.perf_counter_ns(); y = cold(*given); z = time.perf_counter_ns(); D.synchronize(); e = time.perf_counter_ns(); likeness(y, ref)
                return a, z, e, tuple(LOG)
            one(); plain = core.at_full_pace(one, D, 10)
            Walk._issue = logged; one(); x = core.at_full_pace(one, D, 10); Walk._issue = real
            res = lambda: (cold.evict(), D.synchronize(), time.perf_counter_ns(), cold.resident(*given), time.perf_counter_ns(), D.synchronize())
            r = core.at_full_pace(lambda: (lambda t: t[4] - t[2])(res()), D, 10)
        rows = defaultdict(list)
        for a, z, e, log in x.kept:
            t = defaultdict(float); n = defaultdict(int)
            t["before"] = log[0][1] - a; t["after"] = z - log[-1][2]; t["total"] = e - a; t["issued"] = z - a
            for k, (i, s0, s1) in enumerate(log):
                op = prog.ops[i]; kind = type(op).__name__ + (" host" if op.stream == "host" else "")
                t[kind] += s1 - s0; n[kind] += 1
                if isinstance(op, Run):
                    end = log[k + 1][1] if k + 1 < len(log) else z
                    t["layer (gap)"] += end - s1
            for k2, v in t.items(): rows[k2].append(v)
        counts = defaultdict(int)
        for op in prog.ops: counts[type(op).__name__ + (" host" if op.stream == "host" else "")] += 1
        print(f"{b}: predicted total {us(line.makespan_ns)} issued {us(line.issued_ns)}; measured total {us(med([q[2]-q[0] for q in plain.kept]))} issued {us(med([q[1]-q[0] for q in plain.kept]))} apart {len(plain.apart)}; its resident run {us(med(r.kept))}")
        print("   logged: " + ", ".join(f"{k} {us(med(v))}" + (f" ({counts[k]})" if counts.get(k) else "") for k, v in rows.items()), flush=True)
        OUT[b] = {k: v for k, v in rows.items()}
json.dump(OUT, open(sys.argv[5], "w"))
