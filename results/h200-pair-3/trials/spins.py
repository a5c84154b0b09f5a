"""Waits of a graph's layers for copies of its head: for events, as they are, and by a kernel of one thread that reads a word of the GPU's
memory until the copy's stream has written it (cuStreamWriteValue32): by a stream of the GPU behind what landed, or by the push's own."""
import copy, ctypes, json, statistics, sys, time
from dataclasses import replace
from functools import partial
import torch
import hwexec.script as script
from calibrate.beside import runs_beside_copies
from hwexec.core import once_at_full_pace, steady
from hwexec.driver import driver_error, load_driver
from hwexec.preparing import open_device, prepare
from hwexec.starts import kept, likeness, wake
from hwexec.walk import Walk
from sim.files import read_host, read_profile
from sim.models import build
from sim.ops import Record, Wait, is_landing
from sim.search import Options, search
med = statistics.median
PTX = b"""
.version 6.0
.target sm_70
.address_size 64
.visible .entry spin(.param .u64 at)
{
    .reg .pred %no;
    .reg .b32 %v;
    .reg .b64 %a;
    ld.param.u64 %a, [at];
    cvta.to.global.u64 %a, %a;
again:
    ld.acquire.sys.global.u32 %v, [%a];
    setp.eq.u32 %no, %v, 0;
    @%no bra again;
    ret;
}
\0"""
out, root, N, *names = sys.argv[1:]
D = open_device("cuda"); drv = load_driver()
host = read_host(f"{root}/hosts/{N}.yaml"); record = {}
torch.zeros(1, device="cuda:0")
module, function = ctypes.c_void_p(), ctypes.c_void_p()
code = drv.cuModuleLoadData(ctypes.byref(module), PTX)
if code: sys.exit(driver_error(drv, code))
drv.cuModuleGetFunction(ctypes.byref(function), module, b"spin")
drv.cuStreamWriteValue32_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
drv.cuLaunchKernel.argtypes = [ctypes.c_void_p] + 6 * [ctypes.c_uint] + [ctypes.c_uint, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p]
own_ready, own_issue = script._ready, Walk._issue
WORDS = None; AT = {}; ALIVE = []; WAY = "line"
def address(event):
    if id(event) not in AT: AT[id(event)] = 128 * len(AT); ALIVE.append(event)
    return WORDS.data_ptr() + AT[id(event)]
def write(device, stream, event, at):
    raw, f = stream.raw.cuda_stream, drv.cuStreamWriteValue32_v2
    def call():
        code = f(raw, at, 1, 0)
        if code: raise RuntimeError(driver_error(drv, code))
    return call
LAST = {}
def ready(device, op, streams, move, events):
    if WAY == "line" or move is not None: 
        return own_ready(device, op, streams, move, events)
    s = streams[op.stream]
    if WAY == "peer" and isinstance(op, Wait) and is_landing(op.stream):
        LAST[op.stream] = op.event; return lambda: None
    if isinstance(op, Record) and (op.stream == "h2d:0" or is_landing(op.stream)):
        if WAY == "peer" and is_landing(op.stream):
            src = next(v for k, v in streams.items() if k.startswith("p2p") and k.endswith(">0"))
            return PEER_WRITES.setdefault(LAST[op.stream], write(device, src, None, address(events[op.event])))
        return write(device, s, None, address(events[op.event]))
    return own_ready(device, op, streams, move, events)
PEER_WRITES = {}
def issue(self):
    op = self.ops[self.order[self.cursor]]
    if WAY != "line" and self.graph is not None and isinstance(op, Wait) and op.stream == self.compute.name and self.head is not None and op.event in self.head.events:
        if self.opening and self.cursor == self.opening: self.graph.cut()
        self.cursor += 1
        at = ctypes.c_uint64(address(self.head.events[op.event])); args = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.pointer(at), ctypes.c_void_p))
        code = drv.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, self.compute.raw.cuda_stream, args, None)
        if code: raise RuntimeError(driver_error(drv, code))
        return
    own_issue(self)
script._ready, Walk._issue = ready, issue
for name in names:
    m, d, file, *links = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"{root}/profiles/{N}/{file}.yaml"); built = build(m, dtype=d)
    given = built.inputs_on(D.torch_device(0))
    for link in links or "21":
        found = search(p, host, Options(partners=() if link == "1" else None)).best
        best = found.plan; full = replace(best, head=len(best.chunks), opening=0)
        colds, words = {}, {}
        try:
            for k, plan, way in (("best", best, "line"), ("best spin", best, "spin"), ("best peer", best, "peer"), ("line", full, "line"), ("spin", full, "spin"), ("peer", full, "peer")):
                if ("peer" in k and link == "1") or (k.startswith("best") and best == full): continue
                WAY = way; WORDS = torch.zeros(2**16, dtype=torch.int32, device="cuda:0"); AT.clear(); PEER_WRITES.clear(); LAST.clear(); torch.cuda.synchronize()
                try:
                    c = prepare(copy.deepcopy(built.module), plan, built.inputs, network=p.network, host=host, device=D)
                except Exception as e:
                    print(m, k, "FAILED", type(e).__name__, str(e)[:200], flush=True); continue
                if c.why_eager: print(m, k, "EAGER", c.why_eager, flush=True); c.close(); continue
                colds[k] = c; words[k] = WORDS
            with steady(D), torch.no_grad():
                any_ = next(iter(colds.values())); ref = kept(any_.resident(*given)); wake(any_, given)
                waits = {k: sum(isinstance(o, Wait) and o.stream == "compute:0" for o in c.program.ops) for k, c in colds.items()}
                print(f"{m:14} {d} links {link} predicted {found.makespan_ns/1e3:.0f}", flush=True)
                said = {k: f"  {k:9} {waits[k]:2} waits" for k in colds}
                def fresh(k, c):
                    c.evict(); words[k].zero_(); D.synchronize()
                for k, c in list(colds.items()):
                    try:
                        for w in range(2): fresh(k, c); c(*given); D.synchronize(); c.resident(*given); D.synchronize()
                        fresh(k, c); c(*given); D.synchronize()
                        if "best" in k: continue
                        pairs = runs_beside_copies({"whole": partial(c.resident, *given), "waits": partial(c.landed, *given)}, D, 12)
                        record[f"{m} {d} {link} {k} waits"] = [[q.samples_ns for q in pair] for pair in pairs]
                        each = [med((a - b) for a, b in zip(pairs[1][j].samples_ns, pairs[0][j].samples_ns)) / waits[k] for j in (0, 1)]
                        said[k] += f": each {each[0]/1e3:5.2f} us alone, {each[1]/1e3:5.2f} beside;"
                    except Exception as e: said[k] += f" no waits timed: {type(e).__name__} {str(e)[:90]};"
                rows = {k: [] for k in colds}
                def timed(k, c):
                    fresh(k, c); a = time.perf_counter_ns()
                    y = c(*given); i = time.perf_counter_ns(); D.synchronize()
                    return time.perf_counter_ns() - a, i - a, likeness(y, ref).bit_equal
                for r in range(16):
                    for k, c in colds.items():
                        got = once_at_full_pace(partial(timed, k, c), D)
                        if r: rows[k].append(got)
                for k, v in rows.items():
                    record[f"{m} {d} {link} {k} starts"] = v
                    print(said[k], f"starts {med(r[0] for r in v)/1e3:8.1f} us ({min(r[0] for r in v)/1e3:.1f}), issued {med(r[1] for r in v)/1e3:.0f}, right {all(r[2] for r in v)}", flush=True)
        except Exception as e:
            print(m, link, "FAILED", type(e).__name__, str(e)[:300], flush=True)
        finally:
            for c in colds.values(): c.close()
json.dump(record, open(out, "w"))
