"""What a start's end costs the host: all GPUs waited for, the target alone, the caller's stream, its last event; and where the host is by when."""
import copy, json, statistics, sys, time
import torch
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.script import do
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search
med = statistics.median
out, root, N, *names = sys.argv[1:]
cpu = "cpu" in names; names = [n for n in names if n != "cpu"]
D = open_device("cpu" if cpu else "cuda"); host = read_host(f"{root}/hosts/{N}.yaml"); record = {}
for name in names:
    m, d, file, link = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"{root}/profiles/{N}/{file}.yaml"); built = build(m, dtype=d)
    given = built.inputs_on(D.torch_device(0))
    plan = search(p, host, Options(partners=() if link == "1" else None)).best.plan
    with prepare(copy.deepcopy(built.module), plan, built.inputs, network=p.network, host=host, device=D) as cold, steady(D), torch.no_grad():
        ref = kept(cold.resident(*given)); wake(cold, given)
        if cpu: ends = {"all": D.synchronize}
        else:
            E = torch.cuda.Event()
            def event(): E.record(); E.synchronize()
            def query():
                s = torch.cuda.current_stream(0)
                while not s.query(): pass
            ends = {"all": D.synchronize, "one": lambda: torch.cuda.synchronize(0), "stream": lambda: torch.cuda.current_stream(0).synchronize(), "event": event, "query": query}
        def timed(run, cool, end):
            if cool: cold.evict()
            D.synchronize(); a = time.perf_counter_ns(); y = run(*given); i = time.perf_counter_ns(); end(); t = time.perf_counter_ns()
            D.synchronize(); return t - a, i - a, time.perf_counter_ns() - t
        for kind, run, cool in (("cold", cold, True), ("resident", cold.resident, False)):
            rows = {k: [] for k in ends}
            for r in range(2 if cpu else 21):
                for k, end in ends.items():
                    t = once_at_full_pace(lambda: timed(run, cool, end), D)
                    if r: rows[k].append(t)
            record[f"{m} {d} {link} {kind}"] = rows
            print(f"{m:14} {d} {link} {kind:8} " + "; ".join(f"{k} {med(t[0] for t in v)/1e3:.1f} (issued {med(t[1] for t in v)/1e3:.0f}, rest {med(t[2] for t in v)/1e3:.1f})" for k, v in rows.items()), flush=True)
        # ahead of the first copy
        cap = cold._graphs["cold"]; ahead = []; firsts = []; replay = []; brings = []
        for r in range(2 if cpu else 21):
            def steps():
                cold.evict(); D.synchronize()
                a = time.perf_counter_ns(); D.idle(cold._stage.compute); b = time.perf_counter_ns()
                cap.head.copies[0](); c = time.perf_counter_ns(); do(cap.head.copies[1:]); d = time.perf_counter_ns()
                g = cold._inputs.given(given, {}); bring = cold._inputs.stage(cold._stage.compute, g); e = time.perf_counter_ns()
                with D.on(cold._stage.compute):
                    f = time.perf_counter_ns(); bring(); h = time.perf_counter_ns(); cap.start(lambda: None, ahead=True); i = time.perf_counter_ns()
                j = time.perf_counter_ns(); D.synchronize()
                return b - a, c - b, d - c, e - d, f - e, h - f, i - h, j - i
            ahead.append(once_at_full_pace(steps, D))
        record[f"{m} {d} {link} steps"] = ahead
        print("    idle, first copy, other calls, given, on, bring, replay, off: " + ", ".join(f"{med(x)/1e3:.1f}" for x in zip(*ahead[1:])), len(cap.head.copies), "calls", flush=True)
json.dump(record, open(out, "w"))
