"""Plans over two links prepared again and again: which preparations are slow, and where their time goes."""
import sys, time, statistics
from dataclasses import replace
from functools import partial
import torch
from hwexec.executor import prepare, open_device
from hwexec.script import do
from hwexec.starts import take, kept
from hwexec.timing import steady, time_ns
from sim.files import read_host, read_profile
from sim.search import search, Options
from sim.models import build
from sim.timeline import SpanKind
D = open_device("cuda"); med = statistics.median
R = sys.argv[1]; host = read_host(f"{R}/hosts/h100-pair.yaml")
def us(x): return f"{x/1e3:.0f}"
def look(cold):
    t = cold.timeline(); runs = sorted(t.of(SpanKind.RUN), key=lambda s: s.start_ns)
    print("   timeline end", us(t.makespan_ns), "issue", [(us(s.start_ns), us(s.stop_ns)) for s in t.of(SpanKind.ISSUE)])
    print("   layers", [(s.layer, us(s.start_ns), us(s.stop_ns)) for s in runs[::24]], "last", us(runs[-1].stop_ns))
    gaps = [(b.layer, us(b.start_ns - a.stop_ns)) for a, b in zip(runs, runs[1:]) if b.start_ns - a.stop_ns > 60e3]
    print("   gaps", gaps)
    for name in dict.fromkeys(s.stream for s in t.of(SpanKind.COPY)):
        c = [s for s in t.of(SpanKind.COPY) if s.stream == name]
        print("   ", name, [(s.chunk, us(s.start_ns), us(s.stop_ns)) for s in c])
slow_seen = 0
for m, d in (("resnet101", "fp32"), ("convnext_base", "bf16")):
    p = read_profile(f"{R}/profiles/h100-pair/{m}.{d}.b1.yaml"); built = build(m, dtype=d); inputs = built.inputs_on(torch.device("cuda", 0))
    plans = {n: search(p, host, Options(partners=() if n == 1 else None)).best for n in (1, 2)}
    two = plans[2].plan
    variants = [("1L", plans[1].plan)] + [(f"2L #{k}", two) for k in range(3)] + [("2L no opening", replace(two, opening=0)), ("2L head 0", replace(two, opening=0, head=0))] + [(f"2L #{k}", two) for k in (3, 4)]
    with steady(D):
        for name, plan in variants:
            with prepare(built.module, plan, inputs, network=p.network, host=host, device=D) as cold:
                ref = kept(cold.resident(*inputs))
                s = take(partial(cold, *inputs), D, ref, cold.evict, 8)
                handles = {k: hex(v.raw.cuda_stream)[-7:] for k, v in cold._stage.streams.items()}
                print(f"{m} {d} {name}: pred {us(plans[1 if name=='1L' else 2].makespan_ns)} med {us(s.samples.median_ns)} [{us(s.samples.minimum_ns)} {us(max(s.samples.raw))}] issued {us(s.issued.median_ns)} {'ok' if s.worst.bit_equal else 'WRONG'} arenas {[hex(a.data_ptr())[-9:] for a in cold._stage.arenas.values()]} {handles if '#0' in name else ''}", flush=True)
                if s.samples.median_ns > 1.3 * plans[2].makespan_ns and name != "1L" and slow_seen < 3:
                    slow_seen += 1
                    st = D.stream("calibrate", 0)
                    g = time_ns(partial(cold, *inputs), D, [st], repeats=5); D.close_stream(st)
                    print("   gated", us(g.median_ns), us(g.minimum_ns))
                    idle = D.idle; D.idle = lambda s: False
                    f = take(partial(cold, *inputs), D, ref, cold.evict, 6); D.idle = idle
                    print("   behind a fork", us(f.samples.median_ns), us(f.samples.minimum_ns))
                    head = cold._graphs["cold"].head
                    if head is not None:
                        rows = []
                        for _ in range(6):
                            cold.evict(); do(head.copies); do(head.later); D.synchronize()
                            a = time.perf_counter_ns()
                            with D.on(cold._stage.compute):
                                cold._graphs["cold"].graph.replay()
                                if head.opened: cold._graphs["cold"].graph.replay(1)
                            D.synchronize(); rows.append(time.perf_counter_ns() - a)
                        print("   layers alone, all landed", us(med(rows)))
                        rows = []
                        for _ in range(6):
                            cold.evict(); D.synchronize()
                            a = time.perf_counter_ns(); do(head.copies); do(head.later); D.synchronize(); rows.append(time.perf_counter_ns() - a)
                        print("   head alone", us(med(rows)))
                    look(cold)
                    s = take(partial(cold, *inputs), D, ref, cold.evict, 6)
                    print("   again", us(s.samples.median_ns), us(s.samples.minimum_ns), flush=True)
if not slow_seen:
    with prepare(built.module, two, inputs, network=p.network, host=host, device=D) as cold: cold(*inputs); cold.evict(); look(cold)
