from collections import Counter
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.lpo import lists
from palate.lpo.lists import Rules, Votes, build


def votes_of(*rows):
    """Rows of (group, winner, loser[, weight]); a weight of None is a tie."""
    full = [row if len(row) == 4 else (*row, 1.0) for row in rows]
    group, winner, loser, weight = zip(*full, strict=True) if full else ((), (), (), ())
    return Votes(
        np.array(group, dtype=np.int64),
        np.array(winner, dtype=np.int64),
        np.array(loser, dtype=np.int64),
        np.array([value is None for value in weight], dtype=bool),
        np.array([1.0 if value is None else value for value in weight]),
    )


def records(built):
    """The lists as [(group, [images], [tie groups], {(winner, loser): votes})]."""
    made, graph = built.lists, built.graph
    found = []
    for index in range(len(made.lengths)):
        nodes = made.nodes[made.offsets[index] : made.offsets[index + 1]]
        images = graph.node_image[nodes].tolist()
        ties = made.tie_group[made.offsets[index] : made.offsets[index + 1]].tolist()
        edges = {
            (images[made.edge_winner[e]], images[made.edge_loser[e]]): float(graph.support[made.edge[e]])
            for e in range(made.edge_offsets[index], made.edge_offsets[index + 1])
        }
        (group,) = set(graph.node_group[nodes].tolist())
        found.append((group, images, ties, edges))
    return found


def chains(built):
    return sorted(images for _, images, _, _ in records(built))


def fates(built):
    return [lists.FATES[fate] for fate in built.fate]


def test_a_chain_of_comparisons_is_one_list():
    built = build(votes_of((0, 2, 3), (0, 1, 2), (0, 3, 4)), Rules())
    assert records(built) == [(0, [1, 2, 3, 4], [0, 1, 2, 3], {(1, 2): 1, (2, 3): 1, (3, 4): 1})]
    assert fates(built) == ["kept"] * 3


def test_groups_do_not_mix():
    built = build(votes_of((0, 1, 2), (1, 2, 3)), Rules())
    assert [(group, images) for group, images, _, _ in records(built)] == [(0, [1, 2]), (1, [2, 3])]


def test_a_typical_session_repeats_its_upper_part():
    """D > A > {B, C}, as spec a.4 describes the Pick-a-Pic app."""
    built = build(votes_of((0, 4, 1), (0, 1, 2), (0, 1, 3)), Rules())
    assert chains(built) == [[4, 1, 2], [4, 1, 3]]


def test_an_edge_between_images_of_a_list_is_covered_by_it():
    built = build(votes_of((0, 1, 2), (0, 2, 3), (0, 1, 3)), Rules())
    assert chains(built) == [[1, 2, 3]]
    assert records(built)[0][3] == {(1, 2): 1, (2, 3): 1, (1, 3): 1}


def test_what_the_longest_path_leaves_becomes_a_list_of_two():
    built = build(votes_of((0, 1, 2), (0, 2, 3), (0, 5, 6), (0, 5, 2), (0, 1, 6)), Rules())
    assert chains(built) == [[1, 2, 3], [1, 6], [5, 2, 3], [5, 6]]
    assert {edge for *_, edges in records(built) for edge in edges} == {(1, 2), (2, 3), (5, 6), (5, 2), (1, 6)}


def test_net_votes_decide_and_exact_draws_are_ties():
    built = build(
        votes_of((0, 1, 2), (0, 1, 2), (0, 2, 1), (0, 3, 4), (0, 4, 3), (0, 5, 6, None), (0, 1, 2, None)), Rules()
    )
    assert records(built) == [(0, [1, 2], [0, 1], {(1, 2): 1})]
    assert fates(built) == ["kept", "kept", "outvoted", "tied", "tied", "tied", "a tie on a decided pair"]
    drawn = built.graph.node_image[built.graph.draw_first], built.graph.node_image[built.graph.draw_second]
    assert list(zip(*map(np.ndarray.tolist, drawn), strict=True)) == [(3, 4), (5, 6)]


def test_fractional_votes_that_add_up_to_a_draw():
    assert not records(build(votes_of((0, 1, 2, 0.1), (0, 1, 2, 0.2), (0, 2, 1, 0.3)), Rules()))


def test_a_cycle_loses_its_least_supported_edge():
    rows = [(0, 1, 2), (0, 1, 2), (0, 2, 3), (0, 3, 1), (0, 2, 3)]
    built = build(votes_of(*rows), Rules())
    assert chains(built) == [[1, 2, 3]]
    assert fates(built) == ["kept", "kept", "kept", "in a broken cycle", "kept"]
    assert (built.cycles, built.images_in_cycles) == (1, 3)


@pytest.mark.parametrize("oldest", range(3))
def test_of_equal_support_the_newest_is_kept(oldest):
    cycle = [(0, 1, 2), (0, 2, 3), (0, 3, 1)]
    built = build(votes_of(*cycle[oldest:], *cycle[:oldest]), Rules())
    assert fates(built) == ["in a broken cycle", "kept", "kept"]
    assert chains(built) == [[[2, 3, 1], [3, 1, 2], [1, 2, 3]][oldest]]


def test_a_collapsed_cycle_is_one_tie_group():
    rows = [(0, 9, 1), (0, 1, 2), (0, 2, 3), (0, 3, 1), (0, 2, 8)]
    built = build(votes_of(*rows), Rules(cycles="collapse"))
    assert records(built) == [(0, [9, 1, 2, 3, 8], [0, 1, 1, 1, 2], {(9, 1): 1, (2, 8): 1})]
    assert fates(built) == ["kept", "tied", "tied", "tied", "kept"]


def test_images_that_drew_share_a_tie_group_if_wanted():
    rows = [(0, 1, 2), (0, 1, 3), (0, 2, 3, None), (0, 2, 4), (0, 3, 4), (0, 1, 4)]
    assert records(build(votes_of(*rows), Rules(ties="group"))) == [
        (0, [1, 2, 3, 4], [0, 1, 1, 2], dict.fromkeys([(1, 2), (1, 3), (2, 4), (3, 4), (1, 4)], 1))
    ]
    assert chains(build(votes_of(*rows), Rules())) == [[1, 2, 4], [1, 3, 4]]


def test_a_draw_that_votes_contradict_makes_no_tie_group():
    directly = votes_of((0, 1, 2, None), (0, 2, 3, None), (0, 1, 3))
    assert chains(build(directly, Rules(ties="group"))) == [[1, 3]]
    over_others = votes_of((0, 1, 2, None), (0, 1, 3), (0, 3, 2))
    assert chains(build(over_others, Rules(ties="group"))) == [[1, 3, 2]]


def test_long_chains_become_windows_that_overlap_in_one_image():
    built = build(votes_of(*[(0, i, i + 1) for i in range(20)]), Rules(max_length=8))
    assert chains(built) == [list(range(8)), list(range(7, 15)), list(range(14, 21))]


@pytest.mark.parametrize(
    ("length", "chords", "most"), [(40, [(6, 8), (20, 22), (34, 36)], 8), (30, [(3, 6), (12, 15), (21, 24)], 3)]
)
def test_shortcuts_along_a_long_chain_are_covered(length, chords, most):
    """The best path through what is left is cut far before its score says: every round must cover something."""
    votes = [(0, i, i + 1) for i in range(length)] + [(0, *chord) for chord in chords]
    built = build(votes_of(*votes), Rules(max_length=most))
    assert fates(built) == ["kept"] * len(votes)
    covered = {edge for _, _, _, edges in records(built) for edge in edges}
    assert covered == {(winner, loser) for _, winner, loser in votes}
    assert max(map(len, chains(built))) <= most


def test_tie_groups_that_do_not_fit_together_are_cut():
    """Twelve images at thumbs up, two at thumbs down: every vote is kept and no list is too long."""
    up, down = range(12), (20, 21)
    rows = [(0, a, b) for a in up for b in down]
    rows += [(0, a, b, None) for side in (list(up), list(down)) for i, a in enumerate(side) for b in side[i + 1 :]]
    built = build(votes_of(*rows), Rules(ties="group", max_length=8))
    assert max(built.lists.lengths) <= 8
    assert len(built.lists.lengths) == 2
    assert {edge for *_, edges in records(built) for edge in edges} == {(a, b) for a in up for b in down}


def test_top_k_puts_an_image_over_all_that_lost_to_it():
    built = build(votes_of((0, 1, 2), (0, 1, 3), (0, 1, 3), (0, 1, 4), (0, 2, 4)), Rules(kind="topk"))
    assert records(built) == [
        (0, [1, 3, 2, 4], [0, 1, 1, 1], {(1, 3): 2, (1, 2): 1, (1, 4): 1}),
        (0, [2, 4], [0, 1], {(2, 4): 1}),
    ]
    many = build(votes_of(*[(0, 0, i) for i in range(1, 20)]), Rules(kind="topk", max_length=8))
    assert many.lists.lengths.tolist() == [8, 8, 6]


def test_dominance_keeps_a_graph_that_fits_whole():
    diamond = [(0, 1, 2), (0, 1, 3), (0, 2, 4), (0, 3, 4)]
    built = build(votes_of(*diamond), Rules(kind="dominance"))
    assert records(built) == [(0, [1, 2, 3, 4], [0, 1, 1, 2], dict.fromkeys([(1, 2), (1, 3), (2, 4), (3, 4)], 1))]


def test_ranked_pairs_equal_the_plain_definition():
    """Against adding edges one by one to a networkx graph, and asking it for a cycle."""
    generator = np.random.default_rng(0)
    for _ in range(60):
        nodes, count = int(generator.integers(3, 12)), int(generator.integers(3, 40))
        edges = [tuple(generator.choice(nodes, 2, replace=False).tolist()) for _ in range(count)]
        graph, expected = nx.DiGraph(), []
        for winner, loser in edges:
            closes = graph.has_node(loser) and graph.has_node(winner) and nx.has_path(graph, loser, winner)
            expected.append(not closes)
            if not closes:
                graph.add_edge(winner, loser)
        assert lists.keep_acyclic(edges) == expected


random_votes = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 9), st.integers(0, 9), st.sampled_from([1.0, 1.0, 1.0, 2.0, 0.5, None])
    ).filter(lambda row: row[1] != row[2]),
    max_size=60,
)
all_rules = st.builds(
    Rules,
    kind=st.sampled_from(["full", "topk", "dominance"]),
    cycles=st.sampled_from(["break", "collapse"]),
    ties=st.sampled_from(["table", "group"]),
    max_length=st.integers(2, 9),
)


@settings(max_examples=400, deadline=None)
@given(random_votes, all_rules)
def test_every_annotation_has_a_fate_and_every_list_is_right(rows, rules):
    built = build(votes_of(*rows), rules)
    found = records(built)
    assert len(built.fate) == len(rows)

    # The net majority, from its definition.
    net = Counter()
    for group, winner, loser, weight in rows:
        if weight is not None:
            net[group, winner, loser] += weight
            net[group, loser, winner] -= weight
    in_lists = {(group, *edge) for group, _, _, edges in found for edge in edges}
    for (group, winner, loser, weight), fate in zip(rows, fates(built), strict=True):
        margin = net[group, winner, loser]
        if fate == "kept":
            assert (group, winner, loser) in in_lists
            assert weight is not None
            assert margin > 0
        elif fate == "outvoted":
            assert margin < 0
        elif fate == "a tie on a decided pair":
            assert weight is None
            assert margin != 0
        elif fate == "tied":
            assert margin == 0 or rules.cycles == "collapse"
        else:
            assert margin > 0
            assert rules.cycles == "break"

    claims = {group: nx.DiGraph() for group in range(3)}
    for group, images, ties, edges in found:
        assert 2 <= len(images) <= rules.max_length
        assert len(set(images)) == len(images)
        assert ties == sorted(ties)
        assert set(ties) == set(range(ties[-1] + 1))
        place = {image: index for index, image in enumerate(images)}
        for (winner, loser), votes in edges.items():
            assert ties[place[winner]] < ties[place[loser]]
            assert votes == pytest.approx(net[group, winner, loser])
            claims[group].add_edge(winner, loser)
        if rules.kind == "topk":
            assert set(edges) == {(images[0], other) for other in images[1:]}
    if rules.cycles == "break":
        assert all(nx.is_directed_acyclic_graph(graph) for graph in claims.values())
    if rules.kind == "full" and rules.ties == "table" and rules.cycles == "break":
        for group, images, _, _ in found:  # each claim follows from votes
            assert all(claims[group].has_edge(*pair) for pair in pairwise(images))


@settings(max_examples=100, deadline=None)
@given(random_votes, all_rules, st.randoms(use_true_random=False))
def test_the_order_of_groups_and_annotations_does_not_matter(rows, rules, random):
    """Where no two edges of a cycle have equal support; the votes are made so."""
    distinct = [(g, w, o, None if v is None else 1 + 2.0 ** -(i % 15)) for i, (g, w, o, v) in enumerate(rows[:15])]
    shuffled = random.sample(distinct, len(distinct))
    assert records(build(votes_of(*distinct), rules)) == records(build(votes_of(*shuffled), rules))


def test_no_votes_make_no_lists():
    assert records(build(votes_of(), Rules())) == []
    assert records(build(votes_of((0, 1, 2, None)), Rules())) == []


def test_a_list_needs_two_images():
    with pytest.raises(ValueError, match="at least 2"):
        Rules(max_length=1)


@pytest.mark.parametrize("shape", ["star", "dense", "random"])
def test_large_groups_take_no_more_than_seconds(shape):
    """A quadratic cover would take minutes at this size."""
    generator = np.random.default_rng(1)
    if shape == "star":
        rows = [(0, 0, i) for i in range(1, 20_000)] + [(0, 20_001, 0)]
    elif shape == "dense":
        rows = [(0, a, b) for a in range(80) for b in range(a + 1, 80)]
    else:
        pairs = generator.integers(0, 6_000, (9_000, 2))
        rows = [(0, int(a), int(b)) for a, b in pairs if a != b]
    built = build(votes_of(*rows), Rules())
    assert max(built.lists.lengths) <= 8
    assert set(built.fate.tolist()) <= {lists.KEPT, lists.CYCLE, lists.TIED, lists.OUTVOTED}
