"""What a prepared module takes of a GPU besides its weights, by kind."""
import copy, sys, torch, collections
import hwexec
from hwexec.devices import open_device
from sim.files import read_host, read_profile
from sim.models import build
from sim.search import Options, search
device = open_device("cuda"); host = read_host("scenarios/hosts/h100-pair.yaml")
MIB = 2**20
def state():
    free, total = torch.cuda.mem_get_info(0)
    seg = collections.Counter(); act = collections.Counter()
    for s in torch.cuda.memory_snapshot():
        k = "private" if tuple(s["segment_pool_id"]) != (0, 0) else "common"
        seg[k] += s["total_size"]; act[k] += s["allocated_size"]
        if k == "private": seg["private n"] += MIB
    return collections.Counter(used=total - free, reserved=torch.cuda.memory_reserved(0), **{f"{k} segments": v for k, v in seg.items()}, **{f"{k} allocated": v for k, v in act.items()})
nets = [w.split("/") for w in sys.argv[1:]]
made = []
for m, d, f in nets:
    b = build(m, dtype=d); p = read_profile(f"scenarios/profiles/h100-pair/{f}.yaml")
    made.append((m, b, p, search(p, host, Options(0, ())).best.plan))
pool = hwexec.Pool({0: max(hwexec.arena_bytes(p.network, plan)[0] for _, _, p, plan in made)}, device)
held = []
for turn in range(2):
    for m, b, p, plan in made:
        at = state()
        held.append(hwexec.prepare(copy.deepcopy(b.module), plan, b.inputs, network=p.network, host=host, device=device, pool=pool))
        now = state()
        d = {k: round((now[k] - at[k]) / MIB, 1) for k in sorted(set(now) | set(at)) if now[k] != at[k]}
        d["driver"] = round((now["used"] - at["used"] - now["reserved"] + at["reserved"]) / MIB, 1)
        print(turn, m, d, "graphs", {k: id(v) % 1000 for k, v in held[-1]._runs.graphs.items()}, flush=True)
