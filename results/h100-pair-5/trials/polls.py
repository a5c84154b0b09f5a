"""What is late in a plan whose starts take twice as long: landings by polled events; then with parts of it on other streams, the graph
made ready anew, a pause before the launch."""
import copy, json, statistics, sys, time
import torch
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.script import do
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.ops import Copy, Record, Wait
from sim.simulate import simulate
from variants import plans
med = statistics.median
cpu = "cpu" in sys.argv
D = open_device("cpu" if cpu else "cuda")
host = read_host("scenarios/hosts/h100-pair.yaml"); record = {}
for name in [a for a in sys.argv[2:] if a != "cpu"]:
    m, d, file = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"scenarios/profiles/h100-pair/{file}.yaml"); built = build(m, dtype=d)
    given = built.inputs_on(D.torch_device(0)); colds = {}
    for k, plan in plans(p, host).items():
        if k.endswith("h0"): continue
        colds[k] = prepare(copy.deepcopy(built.module), plan, built.inputs, network=p.network, host=host, device=D)
    with steady(D), torch.no_grad():
        first = colds["best"]; ref = kept(first.resident(*given)); wake(first, given)
        found = 0
        for k, c in colds.items():
            S, cap = c._stage.streams, c._graphs["cold"]; head = cap.head
            def timed(before=None, copies=None, stream=None, pause=0.0, poll=False, c=c, cap=cap, head=head):
                c.evict(); D.synchronize()
                stream = stream or c._stage.compute
                done = D.event()
                a = time.perf_counter_ns()
                do(copies or head.copies)
                if pause:
                    while time.perf_counter_ns() - a < pause * 1e9: pass
                b = time.perf_counter_ns()
                with D.on(stream):
                    y = cap.start(lambda: None, ahead=True)
                D.record(stream, done)
                i = time.perf_counter_ns()
                marks = {}
                if poll:
                    left = {**{f"e{n}": e for n, e in head.events.items()}, "done": done}
                    while left:
                        for q in list(left):
                            if D.happened(left[q]): marks[q] = time.perf_counter_ns() - a; del left[q]
                D.synchronize(); t = time.perf_counter_ns() - a
                return t, b - a, i - a, marks, likeness(y, ref).bit_equal
            rows = [once_at_full_pace(timed, D) for _ in range(4)][1:]
            base, pred = med([r[0] for r in rows]), simulate(c.program, p).makespan_ns
            slow = base > 1.2 * pred
            print(f"{m:12} {d} {k:9} {'SLOW' if slow else '    '} {base/1e3:.0f} predicted {pred/1e3:.0f}, head {med([r[1] for r in rows])/1e3:.0f}, issued {med([r[2] for r in rows])/1e3:.0f}, right {all(r[4] for r in rows)}", {n: hex(s.raw.cuda_stream)[-4:] for n, s in S.items()} if not cpu else "", flush=True)
            record[f"{m} {d} {k}"] = [r[:3] for r in rows]
            if not slow and k != "best": continue
            if slow: found += 1
            if found > 3: continue
            marks = [timed(poll=True) for _ in range(4)][-1]
            ops = c.program.ops[:c.program.head_ops]
            where = {f"e{op.event}": op.stream for op in ops if isinstance(op, Record)}
            print("   polled:", "  ".join(f"{where.get(q, q)} {t/1e3:.0f}" for q, t in marks[3].items()), flush=True)
            def say(what, **kw):
                rs = [once_at_full_pace(lambda: timed(**kw), D) for _ in range(5)][1:]
                print(f"   {what:44} {med([r[0] for r in rs])/1e3:7.0f}  issued {med([r[2] for r in rs])/1e3:5.0f} right {all(r[4] for r in rs)}", flush=True)
                record[f"{m} {d} {k} {what}"] = [r[:3] for r in rs]
            say("as it is")
            for j in range(6):
                f = D.stream("compute:x", 0); say(f"compute on another stream {j}", stream=f)
            def moved(which):
                fs = {n: (D.stream(n, s.gpu) if n in which else s) for n, s in S.items()}
                calls = []
                for at, op in enumerate(ops):
                    if isinstance(op, Copy):
                        mv = c._stage._moves[at]; calls.append(D.ready_copy(fs[op.stream], mv.destination, mv.source))
                    elif isinstance(op, Record): calls.append(D.ready_record(fs[op.stream], head.events[op.event]))
                    elif isinstance(op, Wait): calls.append(D.ready_wait(fs[op.stream], head.events[op.event]))
                for n, e in head.ends.items(): calls.append(D.ready_record(fs[n], e))
                return calls
            if not head.opened:
                for which in (["h2d:0"], ["h2d:1"], ["p2p:1>0"], ["h2d:0", "h2d:1", "p2p:1>0"]):
                    for j in range(3): say(f"another {'+'.join(which)} {j}", copies=moved(which))
            say("0.2 ms between head and launch", pause=2e-4)
            say("0.5 ms between head and launch", pause=5e-4)
            if not cpu:
                for j in range(3):
                    for part in cap.graph.parts: part.instantiate()
                    say(f"instantiated again {j}")
            say("as it is, again")
    for c in colds.values(): c.close()
json.dump(record, open(sys.argv[1], "w"))
