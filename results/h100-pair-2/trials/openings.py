"""Openings and a wake of NVLink in whole starts."""
import os, sys, time, json, statistics
from dataclasses import replace
import torch
import sim.moves as moves
from hwexec.executor import prepare, open_device
from hwexec.starts import take, kept, start_cold, nothing
from hwexec.timing import steady
from sim.catalog import find_host, find_profile, Request
from sim.search import search, Options
from sim.models import build
D = open_device("cuda"); med = statistics.median
host = find_host("h100-pair"); OUT = {}
def starts(tag, built, profile, plan, wake=0, runs=15):
    inputs = built.inputs_on(torch.device("cuda", 0))
    with prepare(built.module, plan, inputs, network=profile.network, host=host, device=D) as cold:
        ref = kept(cold.resident(*inputs))
        if wake:
            head = cold._graphs["cold"].head
            stage = cold._stage
            push = stage.streams.get("p2p:1>0")
            a1 = stage.arenas[1]; to = D.view(stage.arenas[0], 1, stage.arenas[0])
            call = D.ready_copy(push, to[:wake], a1[:wake])  # bytes that a later push brings again
            if head is None: return
            head.copies.insert(2, call)
        with steady(D):
            end = time.perf_counter() + .1
            while time.perf_counter() < end: cold.resident(*inputs); D.synchronize()
            s = take(lambda: cold(*inputs), D, ref, cold.evict, runs, paused=6)
            w = take(lambda: cold.resident(*inputs), D, ref, nothing, 8, paused=4)
    OUT[tag] = dict(cold=s.samples.raw, issued=s.issued.raw, paused=s.paused.raw, warm=w.samples.raw, warm_paused=w.paused.raw, equal=s.worst.bit_equal)
    us = lambda x: f"{med(x)/1e3:7.0f}"
    print(f"{tag:62s} {us(s.samples.raw)} [{min(s.samples.raw)/1e3:.0f}] sp {s.samples.spread:.0%} issued {us(s.issued.raw)} paused {us(s.paused.raw)} [{min(s.paused.raw)/1e3:.0f}] warm {us(w.samples.raw)} {us(w.paused.raw)} {'ok' if s.worst.bit_equal else 'WRONG' if not wake else 'differs'}", flush=True)
nets = [("resnet50","fp32",(1,2)),("resnet101","fp32",(2,)),("convnext_base","fp32",(2,)),("hf:bert-base","fp32",(2,)),("resnet50","bf16",(1,)),("resnet101","bf16",(1,)),("convnext_base","bf16",(2,)),("hf:gpt2","bf16",(1,2)),("vit_b_16","bf16",(2,))]
T = time.time()
for m, d, links in nets:
    p = find_profile(host, Request(m, None, d, None)); built = build(m, dtype=d)
    for n in links:
        part = () if n == 1 else None
        moves.OPENINGS = (0, 8, 24, 48); new = search(p, host, Options(partners=part)).best
        moves.OPENINGS = (); old_fn = moves._openings
        import sim.search as S
        S.VARIATIONS = tuple(v for v in moves.VARIATIONS if v is not old_fn); old = search(p, host, Options(partners=part)).best; S.VARIATIONS = moves.VARIATIONS
        tag = f"{m} {d} {n}L"
        starts(f"{tag} old h{old.plan.head}/{len(old.plan.chunks)} pred {old.makespan_ns/1e3:.0f}", built, p, old.plan)
        if new.plan.opening:
            starts(f"{tag} opening {new.plan.opening}/{len(new.plan.chunks)} pred {new.makespan_ns/1e3:.0f}", built, p, new.plan)
            starts(f"{tag} same, no opening", built, p, replace(new.plan, opening=0))
        if n == 2:
            full = replace(new.plan, head=len(new.plan.chunks))
            if not new.plan.opening: starts(f"{tag} all in head", built, p, full)
            starts(f"{tag} all in head, wake", built, p, full, wake=65536)
    print(f"-- {time.time()-T:.0f} s", flush=True)
json.dump(OUT, open(sys.argv[1], "w"))
