"""Where starts over two links spend what nobody predicted: a network's resident graph and its cold one, all of whose copies are in the head and over,
each with nothing beside it, beside copies over the own lane, relays over a partner, and both, in turn; and whole starts, with and
without a push of 64 KiB ahead of the second copy, at once and after 0.1 s without work."""
import json, statistics, sys, time
from dataclasses import replace
from functools import partial
import torch
from hwexec.arena import HostArena
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.script import do
from hwexec.starts import kept, likeness, wake
from hwexec.timing import time_ns
from sim.files import read_host, read_profile
from sim.models import build
from sim.ops import Copy, Run, Wait
from sim.search import Options, search
from sim.simulate import simulate
MIB = 2**20
out, root, N, *names = sys.argv[1:]
cpu = "cpu" in names
names = [n for n in names if n != "cpu"]
D = open_device("cpu" if cpu else "cuda")
host = read_host(f"{root}/hosts/{N}.yaml"); record = {}
SIZE, ROOM = (2**12, 2**16) if cpu else (16 * MIB, 512 * MIB)
arenas = [HostArena(D, ROOM, g) for g in (0, 1)]
for a in arenas: a.tensor.fill_(1)
to = [D.allocate(ROOM, g) for g in (0, 1)]
D.connect(1, 0)
half = ROOM // 2
landing = D.view(to[0][half:], 1, to[0])
own, part, push, land = D.stream("h2d:0", 0), D.stream("h2d:1", 1), D.stream("p2p:1>0", 1), D.stream("land:0", 0)
MODES = ("alone", "own", "relay", "own+relay")
med = statistics.median
def part_of(i): return slice(i * SIZE % half, i * SIZE % half + SIZE)
def sample(run, mode, n, S):
    start, stop = D.event(timing=True), D.event(timing=True)
    first, ends = [D.event(), D.event()], [D.event(timing=True), D.event(timing=True)]
    landed = [D.event() for _ in range(2 * n + 2)]
    def work():
        used, over = [], []
        if "own" in mode:
            for i in range(n + 1):
                D.copy(own, to[0][:half][part_of(i)], arenas[0].tensor[:half][part_of(i)])
                if i == 0: D.record(own, first[0]); used.append(first[0])
            D.record(own, ends[0]); over.append(0)
        if "relay" in mode:
            for i in range(n + 1):
                D.copy(part, to[1][:half][part_of(i)], arenas[1].tensor[:half][part_of(i)])
                D.record(part, landed[2 * i])
                D.wait(push, landed[2 * i])
                D.copy(push, landing[part_of(i)], to[1][:half][part_of(i)])
                D.record(push, landed[2 * i + 1])
                D.wait(land, landed[2 * i + 1])
                if i == 0: D.record(land, first[1]); used.append(first[1])
            D.record(land, ends[1]); over.append(1)
        for e in used: D.wait(S, e)
        D.record(S, start); run(); D.record(S, stop)
        work.over = over
    time_ns(work, D, [S, own, part, push, land], repeats=1, warmup=0)
    if cpu: return 1.0, 2.0
    took = D.elapsed_ns(start, stop)
    return took, min((D.elapsed_ns(start, ends[k]) for k in work.over), default=float("inf"))
for name in names:
    m, d, file = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"{root}/profiles/{N}/{file}.yaml"); built = build(m, dtype=d)
    best = search(p, host, Options()).best.plan
    plan = replace(best, head=len(best.chunks))
    cold = prepare(built.module, plan, built.inputs, network=p.network, host=host, device=D)
    with cold, steady(D), torch.no_grad():
        given = built.inputs_on(D.torch_device(0)); ref = kept(cold.resident(*given)); wake(cold, given)
        S, cap, res = cold._stage.compute, cold._graphs["cold"], cold._graphs["resident"]
        head = cap.head; ops = cold.program.ops[cold.program.head_ops:]
        waits = sum(isinstance(o, Wait) for o in ops)
        places = sum(isinstance(b, Run) and isinstance(a, Wait) for a, b in zip(ops, ops[1:]))
        cold(*given); D.synchronize()
        def resident():
            with D.on(S): res.start(lambda: None, ahead=True)
        def graph():
            with D.on(S):
                if head.opened:
                    cap.graph.replay(); cap.graph.replay(1)
                else: cap.graph.replay()
        base = max(1.0, sample(resident, "alone", 0, S)[0])
        n = 2 if cpu else int(1.5 * base / (SIZE / 55.0)) + 4
        rows = {f"{w} {k}": [] for w in ("resident", "cold") for k in MODES}
        for r in range(3 if cpu else 10):
            for w, run in (("resident", resident), ("cold", graph)):
                for k in MODES:
                    got = sample(run, k, n, S)
                    if r: rows[f"{w} {k}"].append(got)
        alone = med(t for t, _ in rows["resident alone"])
        record[f"{m} {d}"] = rows
        print(f"{m:14} {d} resident alone {alone/1e3:7.1f} us; {waits} waits at {places} places in the graph, opened {head.opened}", flush=True)
        for k, v in rows.items():
            if k != "resident alone":
                print(f"    {k:20} {(med(t for t,_ in v) - alone)/1e3:+8.1f} us{'' if all(l >= t for t, l in v) else '  (outlasts its copies)'}", flush=True)
        # whole starts
        pushes = [op for op in cold.program.ops if isinstance(op, Copy) and op.source is not None]
        K = 2**16 if not cpu else 2**10
        knock = D.stream("knock", 1)
        call = D.ready_copy(knock, landing[:K], to[1][:K])
        normal = list(head.copies)
        def timed(calls, pause, when="start"):
            cold.evict(); D.synchronize()
            if pause: time.sleep(pause)
            a = time.perf_counter_ns()
            do(calls)
            with D.on(S): y = cap.start(lambda: None, ahead=True)
            i = time.perf_counter_ns(); D.synchronize()
            return time.perf_counter_ns() - a, i - a, likeness(y, ref).bit_equal
        pred = simulate(cold.program, p)
        print(f"    predicted {pred.makespan_ns/1e3:.0f} us, issued {pred.issued_ns/1e3:.0f}; pushes {len(pushes)}")
        for pause in (0.0, 0.1):
            got = {"as it is": [], "knock first": [], "knock third": []}
            for r in range(2 if cpu else 9):
                for k, calls in (("as it is", normal), ("knock first", [call, *normal]), ("knock third", [*normal[:2], call, *normal[2:]])):
                    t = once_at_full_pace(partial(timed, calls, pause), D)
                    if r: got[k].append(t)
            record[f"{m} {d} starts {pause}"] = got
            print(f"    pause {pause}: " + "; ".join(f"{k} {med(t[0] for t in v)/1e3:.0f} ({min(t[0] for t in v)/1e3:.0f}) issued {med(t[1] for t in v)/1e3:.0f}{'' if all(t[2] for t in v) else ' WRONG'}" for k, v in got.items()), flush=True)
json.dump(record, open(out, "w"))
