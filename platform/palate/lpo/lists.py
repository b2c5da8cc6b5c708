"""From votes between images to ranked lists: a graph, its cycles, and lists that cover every edge (spec a.4).

    votes -> net votes of each pair -> edges (net majority) and draws
          -> cycles broken by least support, or each collapsed into one tie group
          -> lists: paths ("full"), an image over all that lost to it ("topk"), or the graph itself ("dominance")

Arrays in, arrays out: groups and images are numbers, and what follows from an annotation is one of ``FATES``. Whatever
is equal for all groups is done for all at once; Python walks only through components of more than one edge.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

Kind = Literal["full", "topk", "dominance"]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

KEPT, TIED, OUTVOTED, TIE_OUTVOTED, CYCLE = range(5)
FATES = ("kept", "tied", "outvoted", "a tie on a decided pair", "in a broken cycle")


@dataclass(frozen=True)
class Rules:
    """How lists are made: ``cycles`` are broken or collapsed into a tie group; images that drew are left apart
    (``ties="table"``) or share a tie group where that contradicts no vote (``"group"``)."""

    kind: Kind = "full"
    cycles: Literal["break", "collapse"] = "break"
    ties: Literal["table", "group"] = "table"
    max_length: int = 8

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"a list has at least 2 images, got a maximum length of {self.max_length}")


@dataclass(frozen=True)
class Votes:
    """N annotations, oldest first: arrays (N,). Group and image numbers are below 2**31, ``weight`` is positive."""

    group: Ints
    winner: Ints
    loser: Ints
    tie: NDArray[np.bool_]
    weight: Floats


@dataclass(frozen=True)
class Graph:
    """Net votes. A node is an image of a group, numbered by (group, image); an edge goes from its winner to its loser.

    ``node_group``, ``node_image`` (n,); ``winner``, ``loser`` (nodes), ``support`` (net votes) and ``newest`` (position
    of the last annotation for it), (E,); ``draw_first``, ``draw_second`` (nodes; D,). Of each annotation (N,):
    ``edge`` and ``draw`` are its pair's, or -1; ``agrees`` says that it is for the edge.
    """

    node_group: Ints
    node_image: Ints
    winner: Ints
    loser: Ints
    support: Floats
    newest: Ints
    draw_first: Ints
    draw_second: Ints
    edge: Ints
    draw: Ints
    agrees: NDArray[np.bool_]


@dataclass(frozen=True)
class Lists:
    """L lists by group: list i holds ``nodes[offsets[i]:offsets[i + 1]]``, best first, with their ``tie_group``; its
    edges are ``edge[edge_offsets[i]:edge_offsets[i + 1]]``, from place ``edge_winner`` to place ``edge_loser``."""

    offsets: Ints
    nodes: Ints
    tie_group: Ints
    edge_offsets: Ints
    edge: Ints
    edge_winner: Ints
    edge_loser: Ints

    @property
    def lengths(self) -> Ints:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Built:
    """Lists, the graph they were made from, the fate of every annotation (N,), and how many cycles, as strongly
    connected components, there were."""

    lists: Lists
    graph: Graph
    fate: NDArray[np.int8]
    cycles: int
    images_in_cycles: int


def build(votes: Votes, rules: Rules) -> Built:
    """The lists of all groups. Depends on the order of the annotations only where two edges have equal support."""
    graph = count_votes(votes)
    strong = _components(len(graph.node_group), graph.winner, graph.loser, "strong")
    inside = strong[graph.winner] == strong[graph.loser]
    _, sizes = np.unique(strong, return_counts=True)
    classes = np.arange(len(strong))
    if rules.cycles == "collapse":
        classes, removed = strong, inside
    else:
        removed = _least_support(graph, strong, inside)
    if rules.ties == "group":
        classes = _with_ties(graph, classes, ~removed)
    kept = np.nonzero(~removed)[0]
    lists = _with_edges(graph, kept, *_LISTS[rules.kind](graph, kept, classes, rules))
    if len(np.unique(lists.edge)) != len(kept):
        raise RuntimeError(f"{len(kept)} edges, but the lists hold {len(np.unique(lists.edge))}: a defect of palate")
    fate = _fates(votes, graph, removed, TIED if rules.cycles == "collapse" else CYCLE)
    return Built(lists, graph, fate, int((sizes > 1).sum()), int(sizes[sizes > 1].sum()))


def count_votes(votes: Votes) -> Graph:
    """Net votes of each pair of images in each group."""
    count = len(votes.group)
    nodes, ends = np.unique(
        np.concatenate([votes.group << 32 | votes.winner, votes.group << 32 | votes.loser]), return_inverse=True
    )
    winner, loser = ends[:count], ends[count:]
    low, high = np.minimum(winner, loser), np.maximum(winner, loser)
    pairs, pair = np.unique(low * len(nodes) + high, return_inverse=True)
    sign = np.where(votes.tie, 0, np.where(winner == low, 1, -1))
    # Rounded, because 0.1 + 0.2 against 0.3 is a draw.
    net = np.round(np.bincount(pair, sign * votes.weight, len(pairs)), 6)
    decided = net != 0
    first, second = np.divmod(pairs, max(len(nodes), 1))
    edge = np.where(decided, np.cumsum(decided) - 1, -1)[pair]
    agrees = sign * net[pair] > 0
    newest = np.zeros(int(decided.sum()), dtype=np.int64)
    newest[edge[agrees]] = np.nonzero(agrees)[0]  # the last of equal indices stays
    return Graph(
        node_group=nodes >> 32,
        node_image=nodes & 0xFFFFFFFF,
        winner=np.where(net > 0, first, second)[decided],
        loser=np.where(net > 0, second, first)[decided],
        support=np.abs(net[decided]),
        newest=newest,
        draw_first=first[~decided],
        draw_second=second[~decided],
        edge=edge,
        draw=np.where(decided, -1, np.cumsum(~decided) - 1)[pair],
        agrees=agrees,
    )


def keep_acyclic(edges: Sequence[tuple[int, int]]) -> list[bool]:
    """Which edges, taken in their order, close no cycle with those taken before: ranked pairs (Tideman 1987).

    A topological order is kept up to date (Pearce and Kelly 2006), so an edge costs what it moves.
    """
    wins: dict[int, int] = defaultdict(int)
    for winner, loser in edges:
        wins[winner] += 1
        wins[loser] -= 1
    # Any order will do to begin with; in this one most edges move nothing.
    order = {node: place for place, node in enumerate(sorted(wins, key=lambda node: -wins[node]))}
    after: dict[int, list[int]] = defaultdict(list)
    before: dict[int, list[int]] = defaultdict(list)
    taken = []
    for winner, loser in edges:
        low, high = order[loser], order[winner]
        if high > low:
            below = _reach(loser, after, lambda node: order[node] <= high)  # noqa: B023
            if winner in below:
                taken.append(False)
                continue
            above = _reach(winner, before, lambda node: order[node] >= low)  # noqa: B023
            moved = [*sorted(above, key=order.__getitem__), *sorted(below, key=order.__getitem__)]
            for node, place in zip(moved, sorted(order[node] for node in moved), strict=True):
                order[node] = place
        after[winner].append(loser)
        before[loser].append(winner)
        taken.append(True)
    return taken


def _reach(start: int, next_of: dict[int, list[int]], inside: Any) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        for node in next_of.get(waiting.pop(), ()):
            if node not in found and inside(node):
                found.add(node)
                waiting.append(node)
    return found


def _components(count: int, first: Ints, second: Ints, connection: str) -> Ints:
    """The component of each node, named by its smallest node."""
    matrix = csr_matrix((np.ones(len(first), dtype=np.int8), (first, second)), shape=(count, count))
    _, labels = connected_components(matrix, directed=connection == "strong", connection=connection)
    return _by_smallest(labels)


def _by_smallest(labels: NDArray[Any]) -> Ints:
    """Equal labels become the first index that bears them."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return first[inverse]


def _least_support(graph: Graph, strong: Ints, inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which edges to remove so that no cycle is left: of each strongly connected component, those that ranked pairs
    reject, with the most supported first and the newest first among equals."""
    removed = np.zeros(len(inside), dtype=bool)
    edges = np.nonzero(inside)[0]
    component = strong[graph.winner[edges]]
    edges = edges[np.lexsort((-graph.newest[edges], -graph.support[edges], component))]
    for part in _runs(strong[graph.winner[edges]], edges):
        taken = keep_acyclic(list(zip(graph.winner[part].tolist(), graph.loser[part].tolist(), strict=True)))
        removed[part] = ~np.array(taken)
    return removed


def _runs(sorted_keys: Ints, values: Ints) -> list[Ints]:
    """``values`` split wherever the key changes."""
    return np.split(values, np.nonzero(np.diff(sorted_keys))[0] + 1) if len(values) else []


def _with_ties(graph: Graph, classes: Ints, kept: NDArray[np.bool_]) -> Ints:
    """Classes in which images that drew are together, except where a vote orders them, directly or over others."""
    count = len(classes)
    first, second = classes[graph.draw_first], classes[graph.draw_second]
    merged = _components(count, first, second, "weak")[classes]
    winner, loser = graph.winner[kept], graph.loser[kept]
    contradicted = np.zeros(count, dtype=bool)
    contradicted[merged[winner][merged[winner] == merged[loser]]] = True
    strong = _components(count, merged[winner], merged[loser], "strong")
    sizes = np.bincount(strong, minlength=count)
    contradicted |= sizes[strong] > 1  # of a class that is a member of a cycle of classes
    return _by_smallest(np.where(contradicted[merged], classes + count, merged))


def _fates(votes: Votes, graph: Graph, removed: NDArray[np.bool_], in_cycle: int) -> NDArray[np.int8]:
    decided = graph.edge >= 0
    cyclic = np.zeros(len(decided), dtype=bool)
    cyclic[decided] = removed[graph.edge[decided]]
    lost = np.where(votes.tie, TIE_OUTVOTED, OUTVOTED)
    fate = np.where(graph.agrees, np.where(cyclic, in_cycle, KEPT), np.where(decided, lost, TIED))
    if in_cycle == TIED:  # all images of the cycle are tied now, whoever voted what
        fate = np.where(cyclic, TIED, fate)
    return fate.astype(np.int8)


Flat = tuple[Ints, Ints, Ints]  # lengths of the lists, their nodes, the nodes' tie groups


def _stars(graph: Graph, kept: Ints, classes: Ints, rules: Rules) -> Flat:
    """Every image above those that lost to it, the most votes first: the first place is all that is claimed."""
    del classes
    edges = kept[np.lexsort((graph.loser[kept], -graph.support[kept], graph.winner[kept]))]
    winner = graph.winner[edges]
    place = np.arange(len(edges)) - np.searchsorted(winner, winner)
    starts = np.nonzero(place % (rules.max_length - 1) == 0)[0]
    nodes = np.insert(graph.loser[edges], starts, winner[starts])
    lengths = np.diff(np.append(starts, len(edges))) + 1
    tie_group = np.ones(len(nodes), dtype=np.int64)
    tie_group[np.cumsum(lengths) - lengths] = 0
    return lengths, nodes, tie_group


def _paths(graph: Graph, kept: Ints, classes: Ints, rules: Rules) -> Flat:
    return _walked(graph, kept, classes, rules, _cover)


def _partial_orders(graph: Graph, kept: Ints, classes: Ints, rules: Rules) -> Flat:
    return _walked(graph, kept, classes, rules, _neighbourhoods)


_LISTS = {"full": _paths, "topk": _stars, "dominance": _partial_orders}

Pieces = list[tuple[list[int], list[int]]]  # lists as (nodes, tie groups)
Members = dict[int, list[int]]  # nodes of the classes that have more than one


def _walked(graph: Graph, kept: Ints, classes: Ints, rules: Rules, walk: Any) -> Flat:
    """Lists of each connected component of classes, by ``walk``; at once where it is one edge between two images."""
    count = len(classes)
    pairs = np.unique(classes[graph.winner[kept]] * count + classes[graph.loser[kept]])
    winner, loser = np.divmod(pairs, max(count, 1))
    component = _components(count, winner, loser, "weak")[winner]
    order = np.argsort(component, kind="stable")
    winner, loser, component = winner[order], loser[order], component[order]
    size = np.bincount(classes, minlength=count)
    single = (np.bincount(component, minlength=count)[component] == 1) & (size[winner] + size[loser] == 2)
    members = _members(classes, size)

    lengths = [np.full(int(single.sum()), 2)]
    nodes = [np.stack([winner[single], loser[single]], axis=1).ravel()]
    ties = [np.tile([0, 1], int(single.sum()))]
    starts = [component[single]]
    found: Pieces = []
    where: list[int] = []
    for part in _runs(component[~single], np.nonzero(~single)[0]):
        lists = walk(list(zip(winner[part].tolist(), loser[part].tolist(), strict=True)), members, rules.max_length)
        found += lists
        where += [int(component[part[0]])] * len(lists)
    lengths.append(np.array([len(one) for one, _ in found], dtype=np.int64))
    nodes.append(np.array([node for one, _ in found for node in one], dtype=np.int64))
    ties.append(np.array([tie for _, one in found for tie in one], dtype=np.int64))
    starts.append(np.array(where, dtype=np.int64))
    flat = np.concatenate(lengths), np.concatenate(nodes), np.concatenate(ties)
    return _reordered(*flat, np.argsort(np.concatenate(starts), kind="stable"))


def _members(classes: Ints, size: Ints) -> Members:
    large = np.nonzero(size[classes] > 1)[0]
    found: Members = defaultdict(list)
    for label, node in zip(classes[large].tolist(), large.tolist(), strict=True):
        found[label].append(node)
    return dict(found)


def _reordered(lengths: Ints, nodes: Ints, ties: Ints, order: Ints) -> Flat:
    """The lists in another order."""
    starts = np.cumsum(lengths) - lengths
    taken = lengths[order]
    ends = np.cumsum(taken)
    places = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts[order] - (ends - taken), taken)
    return taken, nodes[places], ties[places]


def _cover(edges: list[tuple[int, int]], members: Members, limit: int) -> Pieces:
    """Paths through one acyclic component that cover every edge.

    An edge is covered when both ends are in one list. In rounds: the best path through each uncovered edge (most
    uncovered edges on it, then the longest) is known; they are taken best first as long as at least half of what made
    them good, or half a list, is still uncovered. The first of a round is the best of all.
    """
    order, after, before = _sorted_graph(edges)
    place = {node: number for number, node in enumerate(order)}
    uncovered = set(edges)
    found: Pieces = []
    while uncovered:
        tails, following = _best(reversed(order), after, uncovered, len(order))
        above = {(loser, winner) for winner, loser in uncovered}
        heads, preceding = _best(order, before, above, len(order))
        unit = len(order) + 1
        through = [(heads[a] + tails[b] + 1 + unit, a, b) for a, b in uncovered]
        through.sort(key=lambda one: (-one[0], place[one[1]], place[one[2]]))
        first = True  # taken whatever it covers, so that every round covers something
        for score, winner, loser in through:
            if (winner, loser) not in uncovered:
                continue
            path = [*reversed(_chain(winner, preceding, above, limit)), *_chain(loser, following, uncovered, limit)]
            fresh = [index for index in range(len(path) - 1) if (path[index], path[index + 1]) in uncovered]
            if not first and len(fresh) < min(score // unit, limit) / 2:
                continue
            first = False
            for window in _windows(path, fresh[0], fresh[-1] + 1, members, limit):
                covered = {(a, b) for i, a in enumerate(window) for b in window[i + 1 :]} & uncovered
                if covered:
                    uncovered -= covered
                    above -= {(b, a) for a, b in covered}
                    found += _written(window, members, limit)
    return found


def _sorted_graph(edges: list[tuple[int, int]]) -> tuple[list[int], dict[int, list[int]], dict[int, list[int]]]:
    """The nodes in topological order, what each is above, and what each is below."""
    after: dict[int, list[int]] = {}
    before: dict[int, list[int]] = {}
    for winner, loser in edges:
        after.setdefault(winner, []).append(loser)
        after.setdefault(loser, [])
        before.setdefault(loser, []).append(winner)
        before.setdefault(winner, [])
    left = {node: len(above) for node, above in before.items()}
    order = sorted(node for node, above in left.items() if not above)
    for node in order:
        for loser in after[node]:
            left[loser] -= 1
            if not left[loser]:
                order.append(loser)
    return order, after, before


def _best(
    order: Any, next_of: dict[int, list[int]], uncovered: set[tuple[int, int]], count: int
) -> tuple[dict[int, int], dict[int, int]]:
    """Of the paths from each node along ``next_of``: the best one's score, (count + 1) times its uncovered edges plus
    its edges, and its next node."""
    scores: dict[int, int] = {}
    following: dict[int, int] = {}
    for node in order:
        best = 0
        for other in next_of[node]:
            score = scores[other] + 1 + (count + 1 if (node, other) in uncovered else 0)
            if score > best:
                best, following[node] = score, other
        scores[node] = best
    return scores, following


def _chain(node: int, following: dict[int, int], fresh: set[tuple[int, int]], limit: int) -> list[int]:
    """The path from a node, up to where ``limit`` edges in a row are not fresh: no list reaches over them."""
    found, stale = [node], 0
    while node in following and stale < limit:
        other = following[node]
        stale = 0 if (node, other) in fresh else stale + 1
        found.append(other)
        node = other
    return found


def _windows(path: list[int], first: int, last: int, members: Members, limit: int) -> Iterator[list[int]]:
    """The part of a path from ``first`` to ``last``, with as much around it as fits, in windows of at most ``limit``
    images that overlap in one class. Two classes that do not fit together are still one window."""

    def images(start: int, stop: int) -> int:
        return sum(len(members.get(node, "1")) for node in path[start:stop])

    stop = last + 1
    while first > 0 and images(first - 1, stop) <= limit:
        first -= 1
    while stop < len(path) and images(first, stop + 1) <= limit:
        stop += 1
    while first < stop - 1:
        end = first + 2
        while end < stop and images(first, end + 1) <= limit:
            end += 1
        yield path[first:end]
        first = end - 1


def _written(window: list[int], members: Members, limit: int) -> Pieces:
    """The lists of a window of classes: one, unless two tie groups do not fit together and each is cut into parts."""
    groups = [members.get(node) or [node] for node in window]
    if sum(map(len, groups)) <= limit:
        return [_piece(groups)]
    better, worse = groups
    upper = min(len(better), limit - min(len(worse), limit // 2))
    sizes = (upper, limit - upper)
    parts = [[one[i : i + size] for i in range(0, len(one), size)] for one, size in zip(groups, sizes, strict=True)]
    return [_piece([first, second]) for first in parts[0] for second in parts[1]]


def _piece(groups: list[list[int]]) -> tuple[list[int], list[int]]:
    nodes = [node for group in groups for node in group]
    return nodes, [number for number, group in enumerate(groups) for _ in group]


def _neighbourhoods(edges: list[tuple[int, int]], members: Members, limit: int) -> Pieces:
    """A component as it is if it fits in a list, else overlapping parts of it, grown along uncovered edges. Tie groups
    are layers: an image's is the length of the longest path to it."""
    order, after, before = _sorted_graph(edges)
    layer: dict[int, int] = {}
    for node in order:
        layer[node] = max((layer[above] + 1 for above in before[node]), default=0)
    place = {node: number for number, node in enumerate(sorted(order, key=lambda one: (layer[one], one)))}
    below = {node: dict.fromkeys(after[node]) for node in order}
    above = {node: dict.fromkeys(before[node]) for node in order}
    found: Pieces = []
    for start in order:
        while below[start]:
            chosen = _grown(start, below, above, members, limit)
            inside = set(chosen)
            for node in chosen:
                for other in [other for other in below[node] if other in inside]:
                    del below[node][other], above[other][node]
            chosen.sort(key=place.__getitem__)
            if len(chosen) == 2:
                found += _written(chosen, members, limit)
                continue
            nodes = [one for node in chosen for one in members.get(node) or [node]]
            layers = [layer[node] for node in chosen for _ in members.get(node) or [node]]
            dense = {value: number for number, value in enumerate(sorted(set(layers)))}
            found.append((nodes, [dense[value] for value in layers]))
    return found


def _grown(start: int, below: Any, above: Any, members: Members, limit: int) -> list[int]:
    """``start`` and what uncovered edges join to it, nearest first, as far as it fits; at least one neighbour."""
    chosen = {start: None}
    room = limit - len(members.get(start, "1"))
    waiting = [start]
    for node in waiting:
        for other in (*below[node], *above[node]):
            need = len(members.get(other, "1"))
            if other not in chosen and (need <= room or len(chosen) == 1):
                chosen[other] = None
                waiting.append(other)
                room -= need
            if room <= 0:
                return list(chosen)
    return list(chosen)


def _with_edges(graph: Graph, kept: Ints, lengths: Ints, nodes: Ints, ties: Ints) -> Lists:
    """The lists with all edges between their images; a list without any is left out."""
    count = max(len(graph.node_group), 1)
    keys = graph.winner[kept] * count + graph.loser[kept]
    order = np.argsort(keys)
    keys, kept = keys[order], kept[order]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    first, second = _places(lengths)
    owner = np.repeat(np.arange(len(lengths)), lengths * (lengths - 1) // 2)
    left, right = nodes[offsets[owner] + first], nodes[offsets[owner] + second]
    wanted = left * count + right
    found = np.searchsorted(keys, wanted)
    ordered = ties[offsets[owner] + first] < ties[offsets[owner] + second]
    match = (found < len(keys)) & ordered
    match[match] = keys[found[match]] == wanted[match]
    owner, first, second, edge = owner[match], first[match], second[match], kept[found[match]]
    edges = np.bincount(owner, minlength=len(lengths))
    useful = np.nonzero(edges > 0)[0]
    taken, nodes, ties = _reordered(lengths, nodes, ties, useful)
    return Lists(
        offsets=np.concatenate([[0], np.cumsum(taken)]),
        nodes=nodes,
        tie_group=ties,
        edge_offsets=np.concatenate([[0], np.cumsum(edges[useful])]),
        edge=edge,
        edge_winner=first,
        edge_loser=second,
    )


def _places(lengths: Ints) -> tuple[Ints, Ints]:
    """All pairs of places i < j of every list, one list after another."""
    known = {int(m): np.triu_indices(int(m), 1) for m in np.unique(lengths)}
    counts = lengths * (lengths - 1) // 2
    first, second = (np.empty(int(counts.sum()), dtype=np.int64) for _ in range(2))
    starts = np.cumsum(counts) - counts
    for m, (rows, columns) in known.items():
        where = starts[lengths == m][:, None] + np.arange(len(rows))
        first[where], second[where] = rows, columns
    return first, second
