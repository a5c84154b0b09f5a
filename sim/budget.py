"""A draft made to hold no more on the target GPU than it may: whole storages are read in place instead, cheapest first."""

from __future__ import annotations

from dataclasses import replace

from sim.draft import Draft, ReadKey, held_bytes, needed
from sim.profile import Profile


def within(budget_bytes: int, draft: Draft, profile: Profile) -> Draft:
    """`draft`, or with as many storages in place as it takes, those first that add least time per byte.

    In place is where that is faster: host memory, or a partner's where the draft has one and nobody reads it otherwise.
    """
    network = profile.network
    if held_bytes(draft, network) <= budget_bytes:
        return draft
    by_storage: dict[int, list[ReadKey]] = {}
    for i, layer in enumerate(network.layers):
        for j, read in enumerate(layer.reads):
            by_storage.setdefault(read.storage, []).append((i, j))
    rows = []
    for storage, keys in by_storage.items():
        direct = sum(profile.layers[i].direct[j].median_ns for i, j in keys)
        peers = [profile.layers[i].peer[j].median_ns for i, j in keys if profile.layers[i].peer]
        at_peer = len(draft.paths) > 1 and len(peers) == len(keys) and sum(peers) < direct
        cost = sum(peers) if at_peer else direct
        rows.append((cost / max(1, network.storages[storage].size_bytes), storage, at_peer))
    rows.sort()
    direct_reads, peer = set(draft.direct), set(draft.peer)
    held = sum(b - a for _, a, b in needed(draft, network))
    for at, (_, storage, at_peer) in enumerate(rows):
        if at_peer:
            peer.add(storage)
            direct_reads -= set(by_storage[storage])
        else:
            direct_reads |= set(by_storage[storage])
        held -= network.storages[storage].size_bytes
        if held > budget_bytes and at + 1 < len(rows):
            continue
        tight = replace(draft, direct=frozenset(direct_reads), peer=frozenset(peer), cuts=None)
        if held_bytes(tight, network) <= budget_bytes:  # padding and small holes included
            return tight
    every = frozenset(key for keys in by_storage.values() for key in keys)
    return replace(draft, direct=every, peer=frozenset(), cuts=None)
