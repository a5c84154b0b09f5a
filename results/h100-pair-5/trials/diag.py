"""Plans whose starts take twice as long in one preparation: their copies by themselves, lane by lane, pushes by themselves and together,
on the plan's own streams and on fresh ones, from its own arenas; then spans of what was slow."""
import copy, json, os, statistics, sys, time
import torch
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness, wake
from hwexec.timing import time_ns
from sim.files import read_host, read_profile
from sim.models import build
from sim.simulate import simulate
from variants import plans
med = statistics.median
cpu = "cpu" in sys.argv
D = open_device("cpu" if cpu else "cuda")
host = read_host("scenarios/hosts/h100-pair.yaml"); record = {}; slow = []
try:
    print("nodes", sorted(os.listdir("/sys/devices/system/node"))[:6], "max connections", os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))
except OSError: pass
for name in [a for a in sys.argv[2:] if a != "cpu"]:
    m, d, file = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"scenarios/profiles/h100-pair/{file}.yaml"); built = build(m, dtype=d)
    given = built.inputs_on(D.torch_device(0)); colds = {}
    for k, plan in plans(p, host).items():
        colds[k] = prepare(copy.deepcopy(built.module), plan, built.inputs, network=p.network, host=host, device=D)
    with steady(D), torch.no_grad():
        first = colds["best"]; wake(first, given)
        for k, c in colds.items():
            row = record[f"{m} {d} {k}"] = {"streams": {n: s.raw.cuda_stream if not cpu else 0 for n, s in c._stage.streams.items()}, "bytes": c.plan.copied_bytes}
            def start(c=c):
                c.evict(); D.synchronize(); a = time.perf_counter_ns(); c(*given); D.synchronize(); return time.perf_counter_ns() - a
            row["cold"] = [once_at_full_pace(start, D) for _ in range(6)][1:]
            moves = list(c._stage.copies()); S = c._stage.streams
            def run(want, streams=S):
                names = [n for n in dict.fromkeys(op.stream for op, _ in moves) if want(n)]
                events = {}
                def work():
                    for op, mv in moves:
                        if not want(op.stream): continue
                        if op.source is not None and (op.chunk, "in") in events: D.wait(streams[op.stream], events[op.chunk, "in"])
                        (mv.issue if streams is S else fresh[id(mv)])()
                        if op.source is None and (op.chunk, "in") in events: D.record(streams[op.stream], events[op.chunk, "in"])
                for op, mv in moves:
                    if op.source is not None and want(op.stream) and want(f"h2d:{op.source}"): events[op.chunk, "in"] = D.event()
                return list(time_ns(work, D, [streams[n] for n in names], repeats=3, warmup=1).raw)
            fs = {n: D.stream("fresh " + n, s.gpu) for n, s in S.items() if n[:3] in ("h2d", "p2p")}
            fresh = {id(mv): D.ready_copy(fs[op.stream], mv.destination, mv.source) for op, mv in moves}
            kinds = {"h0": lambda n: n == "h2d:0", "h1": lambda n: n == "h2d:1", "h0+h1": lambda n: n[:3] == "h2d", "p": lambda n: n[:3] == "p2p", "h1+p": lambda n: n in ("h2d:1", "p2p:1>0"), "all": lambda n: True}
            for kind, want in kinds.items():
                row[kind] = run(want)
            for kind in ("h0+h1", "h1+p", "all"):
                row["fresh " + kind] = run(kinds[kind], fs)
            row["all again"] = run(kinds["all"])
            row["alone"] = list(c.copies_alone().raw)
            for s in fs.values(): D.close_stream(s)
            pred = simulate(c.program, p).makespan_ns
            late = med(row["cold"]) > 1.2 * pred
            print(f"{m:14} {d} {k:9} {'SLOW' if late else '    '} cold {med(row['cold'])/1e3:6.0f} pred {pred/1e3:6.0f}", *(f"{q} {med(v)/1e3:.0f}" for q, v in row.items() if isinstance(v, list) and q != "cold"), flush=True)
            if late and len(slow) < 4: slow.append((f"{m} {d} {k}", c, given))
    for c in colds.values():
        if not any(c is s[1] for s in slow): c.close()
for what, c, given in slow:
    c.evict(); t = c.timeline()
    record[what]["spans"] = [(s.stream, s.kind.value, s.start_ns, s.stop_ns, s.label) for s in t.spans if s.kind.value in ("copy", "issue")]
    print(what)
    for s in [s for s in t.spans if s.kind.value == "copy"][:60]:
        print(f"   {s.stream:9} {s.start_ns/1e3:8.0f} {s.stop_ns/1e3:8.0f} {(s.stop_ns-s.start_ns)/1e3:7.0f} {s.label}")
    c.close()
json.dump(record, open(sys.argv[1], "w"))
