"""The plan of a run: every place once an epoch, shares and passes, and an order that depends on nothing but its inputs."""

import hashlib
import json
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.order import shuffle
from engine.data.plan import Plan
from engine.settings.sections import Source


def places_of(plan, step):
    """Every (source, document, place) of a step, repetitions included."""
    units = plan.units(step)
    columns = (units.source, units.document, units.start, units.places)
    return [
        (s, d, place)
        for s, d, start, n in zip(*(c.tolist() for c in columns), strict=True)
        for place in range(start, start + n)
    ]


def make_plan(datasets, sources=None, **changes):
    settings = {"seed": 0, "context_length": 16, "step_size": 64, "steps": None, "epochs": 1.0} | changes
    return Plan(datasets, sources or [Source(str(i)) for i in range(len(datasets))], **settings)


def run_places(plan):
    return Counter(place for step in range(plan.steps) for place in places_of(plan, step))


def all_places(datasets):
    return {(s, d, p) for s, dataset in enumerate(datasets) for d, n in enumerate(dataset.lengths) for p in range(n - 1)}


def test_an_epoch_holds_every_place_once_and_long_documents_are_split(write_dataset, random_documents):
    datasets = [write_dataset(random_documents(40, 70)), write_dataset(random_documents(9, 30, seed=1))]
    plan = make_plan(datasets)
    assert run_places(plan) == dict.fromkeys(all_places(datasets), 1)
    for step in range(plan.steps):
        units = plan.units(step)
        assert units.places.max() <= 16
        assert (units.start % 16 == 0).all()
    assert make_plan(datasets, epochs=3.0).steps > 2 * plan.steps
    assert run_places(make_plan(datasets, epochs=3.0)) == dict.fromkeys(all_places(datasets), 3)


def test_steps_follow_the_token_budget(write_dataset, random_documents):
    plan = make_plan([write_dataset(random_documents(200, 40))], step_size=100)
    sizes = [plan.units(step).sizes.tolist() for step in range(plan.steps)]
    before = 0
    for step, step_sizes in enumerate(sizes):
        # A step begins with the first unit at or after step * 100, at most one unit later.
        assert step * 100 <= before < step * 100 + 16
        before += sum(step_sizes)
    assert plan.steps == -(-before // 100) or before % 100 < 16


def test_the_order_depends_on_seed_source_and_epoch(write_dataset, random_documents):
    documents = random_documents(50, 15)
    pair = [write_dataset(documents), write_dataset(documents)]

    def order(plan, source):
        units = [plan.units(step) for step in range(plan.steps)]
        return [d for u in units for s, d in zip(u.source.tolist(), u.document.tolist(), strict=True) if s == source]

    one = make_plan(pair, epochs=2.0)
    assert order(one, 0) == order(make_plan(pair, epochs=2.0), 0)
    assert order(one, 0) != order(make_plan(pair, epochs=2.0, seed=1), 0)
    assert order(one, 0) != order(one, 1)
    epochs = order(one, 0)[:50], order(one, 0)[50:]
    assert epochs[0] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(50))


def test_a_shuffle_is_a_permutation_without_a_bias_by_position():
    first = [shuffle(1000, seed, 0, 0) for seed in range(200)]
    assert all(sorted(p.tolist()) == list(range(1000)) for p in first)
    # The mean of each position over 200 seeds is 499.5 +- 5 standard errors of a uniform variable.
    means = np.mean(first, axis=0)
    assert np.abs(means - 499.5).max() < 5 * (1000 / np.sqrt(12)) / np.sqrt(200)


def test_longer_runs_begin_like_shorter_ones(write_dataset, random_documents):
    datasets = [write_dataset(random_documents(60, 40)), write_dataset(random_documents(11, 30, seed=5))]
    shares = [Source("a", share=0.7), Source("b", share=0.2)]
    passes = [Source("a", passes=0.5), Source("b", passes=3)]
    for sources in (shares, passes):
        short = make_plan(datasets, sources, steps=7, epochs=None)
        long = make_plan(datasets, sources, steps=40, epochs=None)
        assert (short.steps, long.steps) == (7, 40)
        assert short.fingerprint == long.fingerprint
        assert all(places_of(short, step) == places_of(long, step) for step in range(7))
    two, four = (make_plan(datasets, passes, epochs=epochs) for epochs in (2.0, 4.0))
    assert all(places_of(two, step) == places_of(four, step) for step in range(two.steps - 1))


def test_shares_hold_at_every_point_of_the_run(write_dataset, random_documents):
    datasets = [write_dataset(random_documents(300, 20)), write_dataset(random_documents(5, 20, seed=2))]
    plan = make_plan(datasets, [Source("a", share=3), Source("b", share=1)], steps=50, epochs=None, step_size=400)
    totals = np.zeros(2)
    for step in range(50):
        units = plan.units(step)
        totals += np.bincount(units.source, weights=units.places, minlength=2)
        assert totals[0] == pytest.approx(0.75 * 400 * (step + 1), abs=2 * 16)
        assert totals[1] == pytest.approx(0.25 * 400 * (step + 1), abs=2 * 16)
    assert plan.passes[1] == pytest.approx(0.25 * 400 * 50 / (datasets[1].lengths - 1).sum(), rel=0.01)


def test_passes_count_documents_and_sources_spread_over_the_run(write_dataset, random_documents):
    datasets = [write_dataset(random_documents(80, 15)), write_dataset(random_documents(20, 15, seed=3))]
    plan = make_plan(datasets, [Source("a"), Source("b", passes=2)])
    counts = run_places(plan)
    assert {counts[place] for place in all_places(datasets) if place[0] == 0} == {1}
    assert {counts[place] for place in all_places(datasets) if place[0] == 1} == {2}
    second = [d for step in range(plan.steps) for s, d, p in places_of(plan, step) if s == 1 and p == 0]
    assert sorted(second[:20]) == sorted(second[20:]) == list(range(20))
    assert all(1 in plan.units(step).source for step in range(plan.steps - 1))


def test_fractional_passes_take_a_deterministic_part(write_dataset, random_documents):
    dataset = write_dataset(random_documents(200, 15))
    total = (dataset.lengths - 1).sum()
    part = run_places(make_plan([dataset], [Source("a", passes=0.25)]))
    assert set(part.values()) == {1}
    assert 0.25 * total <= len(part) < 0.25 * total + 15
    assert part == run_places(make_plan([dataset], [Source("a", passes=0.25)]))
    # Four epochs of a quarter see everything once, not one quarter four times.
    assert run_places(make_plan([dataset], [Source("a", passes=0.25)], epochs=4.0)) == dict.fromkeys(all_places([dataset]), 1)


def test_untrained_segments_of_conversations_are_left_out(write_dataset):
    # Place 31 predicts token 32 and place 48 token 49: of document 0, the segments at 16 and at 48 are trained on.
    masks = [np.isin(np.arange(50), (32, 49)), np.arange(10) == 9]
    dataset = write_dataset([list(range(50)), list(range(10))], "conversations", masks)
    plan = make_plan([dataset], epochs=1.0)
    expected = {(0, p) for p in (*range(16, 32), 48)} | {(1, p) for p in range(9)}
    assert {(d, p) for _, d, p in run_places(plan)} == expected
    assert plan.skipped == [2]
    assert any("2 segments without a trained place" in line for line in plan.describe(64))


def test_preferences_count_pairs_and_leave_out_long_ones(write_dataset):
    documents = [list(range(n)) for n in (5, 9, 17, 4, 3, 40, 6, 6, 2, 2)]
    dataset = write_dataset(documents, "preferences", prompts=[1] * 10)
    plan = make_plan([dataset], step_size=2)
    assert plan.skipped == [1]
    assert plan.paired
    assert plan.steps == 2
    seen = [tuple(plan.units(step).document.reshape(-1, 2).tolist()) for step in range(2)]
    assert sorted(pair for step in seen for pair in step) == [[0, 1], [2, 3], [6, 7], [8, 9]]
    assert all(len(step) == 2 for step in seen)
    assert plan.longest_unit == 19
    assert any("1 pairs longer than context_length = 16" in line for line in plan.describe(32))
    with pytest.raises(ValueError, match="nothing to train on within context_length = 1"):
        make_plan([write_dataset(documents[:2], "preferences", prompts=[1] * 2)], context_length=1)


def test_sources_of_equal_virtual_time_take_turns(write_dataset):
    datasets = [write_dataset([[1] * 9] * 100), write_dataset([[2] * 9] * 100)]
    plan = make_plan(datasets, step_size=8, context_length=8)
    assert [plan.units(step).source.tolist() for step in range(plan.steps)] == [[0], [1]] * 100


@pytest.mark.parametrize(
    ("sources", "changes", "message"),
    [
        ([Source("a", share=1), Source("b")], {"steps": 3, "epochs": None}, "'a' has a share and 'b' has none"),
        ([Source("a", share=1), Source("b", share=1)], {}, "needs steps"),
        ([Source("a", share=1), Source("b", share=1)], {"steps": 3, "epochs": 1.0}, "epochs = 1 has no effect"),
        ([Source("a"), Source("b")], {"epochs": None}, "neither steps nor epochs"),
        ([Source("a"), Source("b")], {"epochs": 0.0}, "epochs = 0.0: must be above 0"),
        ([Source("a"), Source("b")], {"steps": 0}, "steps = 0: must be at least 1"),
        (
            [Source("a"), Source("b")],
            {"steps": 10**6},
            r"steps = 1000000, but 1 epochs of this data make \d+ steps.*raise epochs",
        ),
        ([Source("a"), Source("b")], {"step_size": 10}, r"step_size = 10 is below the longest segment \(16 places\)"),
        ([Source("a")], {}, "1 sources and 2 datasets"),
    ],
)
def test_wrong_settings_are_named(write_dataset, random_documents, sources, changes, message):
    datasets = [write_dataset(random_documents(20, 40)), write_dataset(random_documents(20, 40))]
    with pytest.raises(ValueError, match=message):
        make_plan(datasets, sources, **changes)


def test_wrong_sources_are_named(write_dataset):
    for wrong in ({"share": 1, "passes": 1}, {"share": 0}, {"passes": -1.0}, {"passes": float("nan")}):
        with pytest.raises(ValueError, match="source 'x': "):
            Source("x", **wrong)
    text, pairs = write_dataset([[1, 2]]), write_dataset([[1, 2], [1, 3]], "preferences", prompts=[1, 1])
    with pytest.raises(ValueError, match="preferences do not mix"):
        make_plan([text, pairs])
    with pytest.raises(ValueError, match="source '1' was prepared with another tokenizer than '0'"):
        make_plan([text, write_dataset([[1, 2]], tokenizer="other")])


def test_steps_end_the_epochs_early(write_dataset, random_documents):
    dataset = write_dataset(random_documents(50, 30))
    full, cut = make_plan([dataset]), make_plan([dataset], steps=3)
    assert cut.steps == 3 < full.steps
    assert all(places_of(full, step) == places_of(cut, step) for step in range(3))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_steps_found_alone_equal_a_single_sort_of_the_run(write_dataset, random_documents, data):
    """The definition: sort all units by virtual time, and cut by the places before each unit."""
    datasets = [write_dataset(random_documents(data.draw(st.integers(1, 40)), 30, seed=i)) for i in range(3)]
    sources = [Source("x", passes=data.draw(st.sampled_from([0.3, 1.0, 2.5]))) for _ in datasets]
    epochs = data.draw(st.sampled_from([0.5, 1.0, 2.0]))
    plan = make_plan(datasets, sources, epochs=epochs).unmerged()
    totals = [int(table.sizes.sum()) for table in plan.tables]
    rates = [source.passes * total for source, total in zip(sources, totals, strict=True)]
    rates = [rate / sum(rates) for rate in rates]
    events = []
    for source, table in enumerate(plan.tables):
        target, before, epoch = max(1, round(sources[source].passes * epochs * totals[source])), 0, 0
        while before < target:
            for unit in shuffle(len(table), 0, source, epoch).tolist():
                if before < target:
                    events.append((before / rates[source], source, table.locate(np.array([unit]))))
                before += int(table.sizes[unit])
            epoch += 1
    events.sort(key=lambda event: event[:2])
    expected, before = [[] for _ in range(plan.steps)], 0
    for _, source, (document, start, places) in events:
        expected[before // 64].append((source, int(document[0]), int(start[0]), int(places[0])))
        before += int(places[0])
    for step in range(plan.steps):
        units = plan.units(step)
        columns = (units.source, units.document, units.start, units.places)
        # A step holds its units source by source.
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == sorted(expected[step], key=lambda e: e[0])


def test_less_than_half_a_step_at_the_end_joins_the_step_before(write_dataset):
    """Documents of 16 places. Half a step is left of ten, and stays a step."""
    joined, alone = "tokens: what was left behind it is less than half a step, and joined it", "tokens, and updates the weights"
    for documents, sizes, said in [
        (9, [64, 80], f"the last step holds 80 {joined}"),
        (10, [64, 64, 32], f"the last step holds 32 {alone}"),
        (12, [64, 64, 64], "3 steps of 64 tokens"),
        (1, [16], f"the last step holds 16 {alone}"),
    ]:
        plan = make_plan([write_dataset([list(range(17))] * documents)])
        assert [int(plan.units(step).sizes.sum()) for step in range(plan.steps)] == sizes
        assert said in plan.describe(64)[-1]


def test_the_fingerprint_changes_only_where_the_order_does(write_dataset):
    dataset = write_dataset([list(range(17))] * 9)
    merged, steps = make_plan([dataset]), make_plan([dataset], steps=3)
    assert (merged.steps, merged.unmerged().steps, steps.steps) == (2, 3, 3)
    assert merged.fingerprint != steps.fingerprint == merged.unmerged().fingerprint
    # The fingerprint of the version before the last step could take what was left.
    described = {
        "order": 1,
        "datasets": [dataset.fingerprint],
        "rates": [1.0],
        "seed": 0,
        "context_length": 16,
        "step_size": 64,
    }
    assert steps.fingerprint == hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    assert all(places_of(merged.unmerged(), step) == places_of(steps, step) for step in range(3))
    assert places_of(merged, 1) == places_of(steps, 1) + places_of(steps, 2)


def test_a_plan_of_any_number_of_steps_costs_no_more_than_its_data(write_dataset):
    dataset = write_dataset([[1] * 9] * 20_000)
    tracemalloc.start()
    plan = make_plan([dataset], steps=10**8, epochs=None, step_size=800)
    assert plan.units(10**8 - 1).sizes.tolist() == [8] * 100
    assert plan.summary(800)["tokens"] == 8 * 10**10
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A size and two epochs' orders, 4 bytes each, and little else.
    assert held < 20 * len(dataset) + 2**17


@pytest.mark.parametrize(
    ("sources", "changes"),
    [
        ([Source("0"), Source("1")], {"epochs": 2.0}),
        ([Source("0", passes=2.0), Source("1", passes=0.5)], {"epochs": 1.0}),
        ([Source("0"), Source("1")], {"epochs": None, "steps": 40}),
        ([Source("0", share=3.0), Source("1", share=1.0)], {"epochs": None, "steps": 40}),
    ],
    ids=["epochs", "passes", "steps", "shares"],
)
def test_epochs_are_the_places_so_far_over_those_of_all_sources(write_dataset, random_documents, sources, changes):
    """Within a segment, as a step begins with the first segment at or after its place; exact where the data ends."""
    datasets = [write_dataset(random_documents(40, 70)), write_dataset(random_documents(9, 30, seed=1))]
    plan = make_plan(datasets, sources, **changes)
    total = sum((source.passes or 1.0) * table.total for source, table in zip(sources, plan.tables, strict=True))
    places = 0
    for step in range(plan.steps):
        places += int(plan.units(step).sizes.sum())
        assert plan.epoch(step + 1) == pytest.approx(places / total, abs=2 * 16 / total)
    if plan.passes and changes["epochs"]:
        assert plan.epoch(plan.steps) == places / total == pytest.approx(changes["epochs"], abs=16 / total)


def test_the_summary_counts_the_places_of_the_steps(write_dataset, random_documents):
    datasets = [write_dataset(random_documents(80, 40)), write_dataset(random_documents(20, 15, seed=3))]
    plan = make_plan(datasets, [Source("a"), Source("b", passes=2)], steps=5)
    summary = plan.summary(64)
    held = Counter(place[0] for step in range(5) for place in places_of(plan, step))
    assert [source["tokens"] for source in summary["sources"]] == [held[0], held[1]]
    assert summary["tokens"] == held.total()
    assert [source["fraction"] for source in summary["sources"]] == pytest.approx([held[i] / held.total() for i in (0, 1)])
    assert 0.5 < summary["utilisation"] <= 1
    assert len(plan.describe(64)) == 3
