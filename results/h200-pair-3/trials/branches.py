"""Where a graph's waits for its head stand: in line between the layers, as they are; on one branch beside the layers, each of which has
an edge to its own; each a root of its own; and one branch for each lane. All copies ahead, and the best plan as it is."""
import copy, json, statistics, sys, time
from dataclasses import replace
from functools import partial
import torch
from calibrate.beside import runs_beside_copies
from hwexec.core import once_at_full_pace, steady
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness, wake
from hwexec.walk import Walk
from sim.files import read_host, read_profile
from sim.models import build
from sim.ops import Wait, compute_stream, HOST
from sim.search import Options, search
med = statistics.median
out, root, N, *names = sys.argv[1:]
cpu = "cpu" in names
names = [n for n in names if n != "cpu"]
D = open_device("cpu" if cpu else "cuda")
host = read_host(f"{root}/hosts/{N}.yaml"); record = {}
own_begin, own_issue = Walk.begin, Walk._issue
WAY = "line"
SIDES = [D.stream(f"side:{i}", 0) for i in range(64)]
def side(walk, key):
    s = SIDES[walk.keys.setdefault(key, len(walk.keys))]
    if key not in walk.forked:
        D.wait(s, walk.origin); walk.forked.add(key)
    return s
def begin(self):
    self.forked = set(); self.keys = {}
    if WAY != "line" and self.graph is not None:
        self.origin = D.event(); D.record(self.compute, self.origin)
    own_begin(self)
def issue(self):
    op = self.ops[self.order[self.cursor]]
    if self.graph is not None and self.opening and self.cursor == self.opening and WAY != "line":
        raise RuntimeError("no openings here")
    if WAY != "line" and isinstance(op, Wait) and op.stream == self.compute.name and self.head is not None and op.event in self.head.events:
        self.cursor += 1
        lane = self.lanes.setdefault(op.event, len(self.lanes)) if WAY == "roots" else WAY == "lanes" and str(self.owner.get(op.event)) or "one"
        s = side(self, lane)
        D.wait_outside(s, self.head.events[op.event])
        e = D.event(); D.record(s, e); D.wait(self.compute, e)
        return
    own_issue(self)
Walk.lanes = {}
Walk.owner = {}
Walk.begin, Walk._issue = begin, issue
for name in names:
    m, d, file, *links = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"{root}/profiles/{N}/{file}.yaml"); built = build(m, dtype=d)
    given = built.inputs_on(D.torch_device(0))
    for link in links or "21":
        best = search(p, host, Options(partners=() if link == "1" else None)).best.plan
        full = replace(best, head=len(best.chunks), opening=0)
        colds = {}
        try:
            for k, plan, way in (("best", best, "line"), ("line", full, "line"), ("branch", full, "branch"), ("lanes", full, "lanes"), ("roots", full, "roots")):
                if (k == "lanes" and link == "1") or (k == "best" and best == full): continue
                WAY = way; Walk.lanes = {}
                from sim.program import lower
                Walk.owner = {op.event: op.stream for op in lower(plan, p.network, host).ops if type(op).__name__ == "Record"}
                c = prepare(copy.deepcopy(built.module), plan, built.inputs, network=p.network, host=host, device=D)
                if c.why_eager: print(m, k, "EAGER", c.why_eager, flush=True); c.close(); continue
                colds[k] = c
            with steady(D), torch.no_grad():
                any_ = next(iter(colds.values())); ref = kept(any_.resident(*given)); wake(any_, given)
                waits = {k: sum(isinstance(o, Wait) and o.stream == "compute:0" for o in c.program.ops[c.program.head_ops:]) for k, c in colds.items()}
                print(f"{m:14} {d} links {link} predicted {search(p, host, Options(partners=() if link == '1' else None)).best.makespan_ns/1e3:.0f}", flush=True)
                said = {k: f"  {k:7} {waits[k]:2} waits" for k in colds}
                for k, c in colds.items():
                    if k == "best": continue
                    for w in range(2): c(*given); D.synchronize(); c.resident(*given); D.synchronize()
                    c(*given); D.synchronize()
                    try:
                        pairs = runs_beside_copies({"whole": partial(c.resident, *given), "waits": partial(c.landed, *given)}, D, 12)
                        record[f"{m} {d} {link} {k} waits"] = [[q.samples_ns for q in pair] for pair in pairs]
                        each = [med((a - b) for a, b in zip(pairs[1][j].samples_ns, pairs[0][j].samples_ns)) / waits[k] for j in (0, 1)]
                        said[k] += f": each {each[0]/1e3:5.2f} us alone, {each[1]/1e3:5.2f} beside;"
                    except Exception as e: said[k] += f" no waits timed: {type(e).__name__} {str(e)[:90]};"
                rows = {k: [] for k in colds}
                def timed(c):
                    c.evict(); D.synchronize(); a = time.perf_counter_ns()
                    y = c(*given); i = time.perf_counter_ns(); D.synchronize()
                    return time.perf_counter_ns() - a, i - a, likeness(y, ref).bit_equal
                for r in range(3 if cpu else 15):
                    for k, c in colds.items():
                        got = once_at_full_pace(partial(timed, c), D)
                        if r: rows[k].append(got)
                for k, v in rows.items():
                    record[f"{m} {d} {link} {k} starts"] = v
                    print(said[k], f"starts {med(r[0] for r in v)/1e3:8.1f} us ({min(r[0] for r in v)/1e3:.1f}), issued {med(r[1] for r in v)/1e3:.0f}, right {all(r[2] for r in v)}", flush=True)
        except Exception as e:
            print(m, link, "FAILED", type(e).__name__, str(e)[:300], flush=True)
        finally:
            for c in colds.values(): c.close()
json.dump(record, open(out, "w"))
