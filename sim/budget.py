"""A draft made to hold no more on the target GPU than it may: whole storages are read in place instead, cheapest first.

Partners hold what they have room for.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import accumulate

from sim.draft import Draft, ReadKey, held_bytes, needed
from sim.host import Host
from sim.memory import PADDING_BYTES, apart, room_bytes
from sim.profile import Profile


def within(budget_bytes: int, draft: Draft, profile: Profile, host: Host) -> Draft:
    """`draft`, or with as many storages in place as it takes, those first that add least time per byte.

    In place is where that is faster: host memory, or a partner's where the draft has one with room and nobody reads it
    otherwise. Of storages far larger than most a partner may take none: room is kept back for the largest that stays on any,
    and more may stay without it.
    """
    network = profile.network
    if held_bytes(draft, network) <= budget_bytes:
        return draft
    sizes = sorted(storage.size_bytes for storage in network.storages)
    limits = [sizes[-1]]
    if len(draft.paths) > 1:
        whole, sums = sum(sizes), zip(sizes, accumulate(sizes), strict=True)
        limits.append(next(size for size, so_far in sums if 10 * so_far >= 9 * whole))
    found = [_within(budget_bytes, draft, profile, host, most) for most in dict.fromkeys(limits)]
    return max(found, key=lambda tight: sum(network.storages[at].size_bytes for at in tight.peer))


def _within(budget_bytes: int, draft: Draft, profile: Profile, host: Host, most: int) -> Draft:
    """The same, with storages of at most so many bytes on partners."""
    network = profile.network
    by_storage: dict[int, list[ReadKey]] = {}
    for i, layer in enumerate(network.layers):
        for j, read in enumerate(layer.reads):
            if read.storage not in draft.kept:
                by_storage.setdefault(read.storage, []).append((i, j))
    sizes = [storage.size_bytes for storage in network.storages]
    direct = {
        storage: sum(profile.layers[i].direct[j].median_ns for i, j in keys) / max(1, sizes[storage])
        for storage, keys in by_storage.items()
    }
    rows = []
    for storage, keys in by_storage.items():
        if storage in draft.peer:  # lies there already, and frees nothing here
            continue
        peers = [profile.layers[i].peer[j].median_ns for i, j in keys if profile.layers[i].peer]
        cost = sum(peers) / max(1, sizes[storage])
        at_peer = len(draft.paths) > 1 and len(peers) == len(keys) and cost < direct[storage]
        at_peer = at_peer and 0 < sizes[storage] <= most  # what has no bytes comes nowhere
        rows.append((cost if at_peer else direct[storage], storage, at_peer))
    heapify(rows)
    ways, crossed = apart(path[:-1] for path in draft.paths if len(path) > 1)
    room = sum(min(room_bytes(host, gpu) for gpu in way) for way in ways)
    direct_reads, peer = set(draft.direct), set(draft.peer)
    staying = sum(sizes[storage] + PADDING_BYTES for storage in peer)
    largest = max((sizes[storage] + PADDING_BYTES for storage in peer), default=0)
    held = sum(b - a for _, a, b in needed(draft, network))
    held += sum(b - a for a, b in network.ranges(draft.kept))
    while rows:
        _, storage, at_peer = heappop(rows)
        if at_peer:
            size = sizes[storage] + PADDING_BYTES
            # where one fits nowhere, each way over partners has less than its size left
            if (staying + size) * crossed + (len(ways) - 1) * max(largest, size) > room:
                heappush(rows, (direct[storage], storage, False))
                continue
            staying, largest = staying + size, max(largest, size)
            peer.add(storage)
            direct_reads -= set(by_storage[storage])
        else:
            direct_reads |= set(by_storage[storage])
        held -= sizes[storage]
        if held > budget_bytes and rows:
            continue
        tight = replace(draft, direct=frozenset(direct_reads), peer=frozenset(peer), cuts=None)
        if held_bytes(tight, network) <= budget_bytes:  # padding and small holes included
            return tight
    every = frozenset(key for keys in by_storage.values() for key in keys)
    return replace(draft, direct=every, peer=frozenset(), cuts=None)
