"""Waits of a graph's layers for copies of its head: for events, as they are, and for words of memory that the copies' streams write
(cuStreamWriteValue32, cuStreamWaitValue32), in the GPU's memory and in pinned host memory. One lane, at most 32 waits."""
import ctypes, copy, json, statistics, sys, time
from functools import partial
import torch
from calibrate.beside import runs_beside_copies
from calibrate.ways import cut
from hwexec.core import once_at_full_pace, steady
from hwexec.driver import driver_error, load_driver
from hwexec.preparing import open_device, prepare
from hwexec.script import do
from hwexec.starts import kept, likeness, wake
from sim.files import read_host, read_profile
from sim.models import build
from sim.ops import Wait
from sim.search import Options, search
med = statistics.median
D = open_device("cuda"); drv = load_driver()
for f, n in (("cuStreamWaitValue32_v2", 4), ("cuStreamWriteValue32_v2", 4)):
    getattr(drv, f).argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]; getattr(drv, f).restype = ctypes.c_int
host = read_host("scenarios/hosts/h100-pair.yaml"); record = {}
own_record, own_wait = D.ready_record, D.wait_outside
class Words:
    def __init__(self, where):
        self.words = torch.zeros(4096, dtype=torch.int32, device="cuda") if where == "gpu" else torch.zeros(4096, dtype=torch.int32).pin_memory()
        self.of, self.alive = {}, []
    def address(self, event):
        if id(event) not in self.of: self.of[id(event)] = 8 * len(self.of); self.alive.append(event)
        return self.words.data_ptr() + 4 * self.of[id(event)]
    def ready_record(self, stream, event):
        call = own_record(stream, event)
        if not stream.name.startswith("h2d"): return call
        at, raw, f = self.address(event), stream.raw.cuda_stream, drv.cuStreamWriteValue32_v2
        def both():
            call()
            code = f(raw, at, 1, 0)
            if code: raise RuntimeError(driver_error(drv, code))
        return both
    def wait_outside(self, stream, event):
        code = drv.cuStreamWaitValue32_v2(stream.raw.cuda_stream, self.address(event), 1, 0)
        if code: raise RuntimeError(driver_error(drv, code))
for name in sys.argv[2:]:
    m, d, file = name.split(":"); m = m.replace("@", "hf:")
    p = read_profile(f"scenarios/profiles/h100-pair/{file}.yaml"); built = build(m, dtype=d)
    given = built.inputs_on(D.torch_device(0))
    for which, plan in (("cut", cut(p.network)), ("best", search(p, host, Options(partners=())).best.plan)):
        for way in ("events", "gpu words", "host words"):
            words = None if way == "events" else Words(way.split()[0])
            D.ready_record, D.wait_outside = (own_record, own_wait) if words is None else (words.ready_record, words.wait_outside)
            try:
                with prepare(copy.deepcopy(built.module), plan, built.inputs, network=p.network, host=host, device=D) as cold, steady(D), torch.no_grad():
                    if cold.why_eager: print(m, way, "EAGER", cold.why_eager, flush=True); continue
                    waits = sum(isinstance(o, Wait) and o.stream == "compute:0" for o in cold.program.ops)
                    if words is not None: words.words.zero_()
                    ref = kept(cold.resident(*given)); wake(cold, given)
                    D.synchronize(); cold(*given); D.synchronize(); cold.resident(*given); D.synchronize()
                    said = f"{m:14} {d} {which:4} {way:10} {waits:2} waits"
                    if which == "cut":
                        pairs = runs_beside_copies({"whole": partial(cold.resident, *given), "waits": partial(cold.landed, *given)}, D, 16)
                        record[f"{m} {d} {which} {way}"] = [[q.samples_ns for q in pair] for pair in pairs]
                        each = [med((a - b) / waits for a, b in zip(pairs[1][k].samples_ns, pairs[0][k].samples_ns)) for k in (0, 1)]
                        said += f": each {each[0]/1e3:5.2f} us alone, {each[1]/1e3:5.2f} beside copies;"
                    cap = cold._graphs["cold"]; S = cold._stage.compute
                    def timed():
                        cold.evict()
                        if words is not None: words.words.zero_()
                        D.synchronize(); a = time.perf_counter_ns()
                        y = cold(*given); i = time.perf_counter_ns(); D.synchronize()
                        return time.perf_counter_ns() - a, i - a, likeness(y, ref).bit_equal
                    rows = [once_at_full_pace(timed, D) for _ in range(13)][1:]
                    record[f"{m} {d} {which} {way} starts"] = rows
                    print(said, f"starts {med(r[0] for r in rows)/1e3:8.1f} us ({min(r[0] for r in rows)/1e3:.1f}), issued {med(r[1] for r in rows)/1e3:.0f}, right {all(r[2] for r in rows)}", flush=True)
            except Exception as e:
                print(m, which, way, "FAILED", type(e).__name__, str(e)[:200], flush=True)
json.dump(record, open(sys.argv[1], "w"))
