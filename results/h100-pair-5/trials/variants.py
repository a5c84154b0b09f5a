"""The same cuts with all copies in the graph, some ahead, all ahead, and with 6 to 48 groups: started in turn in one process."""
import copy, json, statistics, sys, time
from dataclasses import replace
import torch
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness, wake
from sim.draft import EVERY, Draft
from sim.files import read_host, read_profile
from sim.models import build
from sim.plan import Launch
from sim.program import lower
from sim.search import Options, _Finder, search
from sim.simulate import simulate

med = statistics.median
HEADS, GROUPS = (0, 4, EVERY), (6, 12, 24, 48)

def plans(profile, host):
    """By name; the same ones on any machine."""
    f = _Finder(profile, host, Options())
    obvious = f._cheaper_in_place(0.5, f.paths)
    found = {"best": search(profile, host, Options()).best.plan}
    for groups in GROUPS:
        base = f._cut(Draft(Launch.GRAPH, obvious, frozenset(), f.paths, groups=groups))
        for head in HEADS:
            found[f"g{groups} h{'all' if head == EVERY else head}"] = f._plan(replace(base, head=head))
    return found

def main(out, names, cpu=False):
    D = open_device("cpu" if cpu else "cuda")
    host = read_host("scenarios/hosts/h100-pair.yaml"); record = {}
    for name in names:
        m, d, file = name.split(":"); m = m.replace("@", "hf:")
        p = read_profile(f"scenarios/profiles/h100-pair/{file}.yaml"); built = build(m, dtype=d)
        given = built.inputs_on(D.torch_device(0)); colds, rec = {}, {}
        try:
            for k, plan in plans(p, host).items():
                colds[k] = prepare(copy.deepcopy(built.module), plan, built.inputs, network=p.network, host=host, device=D, settles=True)
            ok = []
            with steady(D):
                first = colds["best"]; ref = kept(first.resident(*given)); wake(first, given)
                for r in range(10):
                    for k, c in colds.items():
                        def start(c=c):
                            c.evict(); D.synchronize(); a = time.perf_counter_ns(); y = c(*given); i = time.perf_counter_ns() - a; D.synchronize(); t = time.perf_counter_ns() - a
                            ok.append(likeness(y, ref).bit_equal); return t, i
                        t = once_at_full_pace(start, D)
                        if r: rec.setdefault(k, []).append(t)
            for k, c in colds.items():
                s = simulate(c.program, p)
                x = med([t for t, _ in rec[k]]); i = med([i for _, i in rec[k]])
                print(f"{m:16} {d} {k:9} {len(c.plan.chunks):3} chunks, measured {x/1e3:7.0f} us, predicted {s.makespan_ns/1e3:7.0f} {s.makespan_ns/x-1:+.1%}, issued {i/1e3:4.0f} predicted {s.issued_ns/1e3:4.0f}", flush=True)
            print(m, d, "all right" if all(ok) else "WRONG", flush=True)
        finally:
            for c in colds.values(): c.close()
        record[f"{m} {d}"] = rec
    json.dump(record, open(out, "w"))

if __name__ == "__main__":
    main(sys.argv[1], [a for a in sys.argv[2:] if a != "cpu"], "cpu" in sys.argv)
