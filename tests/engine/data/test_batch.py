"""Steps cut into micro-batches: packing, ranks, shared prompts, padding, prefetching, evaluation."""

import threading
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.batch import Batch, Packing, evaluation_batches, make_step, padded_places, share_of
from engine.data.plan import Plan
from engine.data.stream import step_stream
from engine.settings.sections import Source
from kernels.attention.work import pairs_of

WINDOW = 5
# Fields of a batch with a value for each place.
PLACED = ("tokens", "labels", "weight", "positions", "document")


def make_plan(datasets, **changes):
    settings = {"seed": 0, "context_length": 16, "step_size": 64, "steps": None, "epochs": 1.0} | changes
    return Plan(datasets, [Source(str(i)) for i in range(len(datasets))], **settings)


def examples(batches):
    """Counts of (document id, place, token, label, weight, position) over the places of real documents. A shared prompt counts
    for each side."""
    found = Counter()
    for batch in batches:
        segments = batch.attention.segments
        prefixes = {prefix for *_, prefix in segments}
        for number, (start, end, prefix) in enumerate(segments):
            i = int(batch.document_T[start])
            document = int(batch.document_B[i])
            if number in prefixes or document < 0:
                continue
            for at in [*range(*(segments[prefix][:2] if prefix >= 0 else (0,))), *range(start, end)]:
                position = int(batch.positions_T[at])
                place = int(batch.document_start_B[i]) + position
                values = (int(batch.tokens_T[at]), int(batch.labels_T[at]), float(batch.weight_T[at]))
                found[(document, place, *values, position)] += 1
    return found


def with_common_beginnings(documents, rng):
    """Pairs of the documents with equal beginnings, and prompts that are shorter, longer or as long as the equal part."""
    made, prompts = [], []
    for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
        shorter = min(len(chosen), len(rejected))
        common = int(rng.integers(0, shorter))
        made += [chosen, chosen[:common] + rejected[common:]]
        prompts += [int(rng.integers(0, shorter))] * 2
    return made, prompts


def check_form(batch, capacity):
    segments, documents = batch.attention.segments, len(batch.document_B)
    assert segments[0][0] == 0
    assert segments[-1][1] == len(batch.tokens_T) <= capacity
    assert all(a[1] == b[0] for a, b in pairwise(segments))
    # A document is one segment, plus the prompt that it continues; its positions count both.
    places = len(batch.tokens_T)
    for start, end, prefix in segments:
        of = set(batch.document_T[start:end].tolist())
        assert len(of) == 1
        before = segments[prefix][1] - segments[prefix][0] if prefix >= 0 else 0
        assert batch.positions_T[start:end].tolist() == list(range(before, before + end - start))
    assert batch.document_T.unique().tolist() == list(range(documents))
    assert (batch.attention.tokens, batch.attention.window) == (places, WINDOW)
    for name, dtype, length in (
        ("tokens_T", torch.int64, places),
        ("labels_T", torch.int64, places),
        ("weight_T", torch.float32, places),
        ("positions_T", torch.int32, places),
        ("document_T", torch.int64, places),
        ("document_B", torch.int64, documents),
        ("document_start_B", torch.int64, documents),
        ("document_length_B", torch.int64, documents),
    ):
        tensor = getattr(batch, name)
        assert (tensor.dtype, tensor.shape) == (dtype, (length,)), name
    assert batch.rows_N.dtype == torch.int32
    assert len(batch.rows_N) % 128 == 0 < len(batch.rows_N)
    rows = batch.rows_N.tolist()
    trained = batch.weight_T.nonzero().flatten().tolist()
    assert rows == trained + [-1] * (len(rows) - len(trained))
    assert len(rows) - len(trained) < 128 or not trained


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_step_holds_the_same_places_for_every_pack_size_and_rank_count(write_dataset, random_documents, data):
    seed = data.draw(st.integers(0, 99))
    kinds = data.draw(st.sampled_from([("text", "conversations"), ("text",), ("preferences",)]))
    paired = kinds == ("preferences",)
    datasets = []
    for i, kind in enumerate(kinds):
        documents = random_documents(2 * data.draw(st.integers(1, 12)), 17 if paired else 60, seed + i)
        rng = np.random.default_rng(seed)
        masks = [np.append(rng.integers(0, 2, len(document) - 1), 1).astype(bool) for document in documents]
        prompts = None
        if paired:
            documents, prompts = with_common_beginnings(documents, rng)
            masks = [mask & (np.arange(len(mask)) >= rng.integers(0, len(mask))) for mask in masks]
        datasets.append(write_dataset(documents, kind, masks, prompts=prompts))
    plan = make_plan(datasets, step_size=3 if paired else 64)
    step = data.draw(st.integers(0, plan.steps - 1))
    reference = make_step(plan, step, Packing(WINDOW, plan.longest_unit))
    expected = examples(reference.batches)
    assert sum(key[4] * count for key, count in expected.items()) == reference.weight > 0
    assert expected.total() == reference.tokens
    assert reference.tokens_saved == 0
    totals = (reference.weight, reference.pairs, reference.tokens)
    if data.draw(st.booleans()):
        plan = make_plan(datasets, step_size=3 if paired else 64, share_prompts=True)
    pack_tokens = plan.longest_unit + data.draw(st.integers(0, 100))
    ranks = data.draw(st.integers(1, 4))
    parts = [make_step(plan, step, Packing(WINDOW, pack_tokens, rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert {(part.weight, part.pairs, part.tokens + part.tokens_saved) for part in parts} == {totals}
    assert len({len(part.batches) for part in parts}) == 1
    batches = [batch for part in parts for batch in part.batches]
    assert examples(batches) == expected
    assert sum(batch.tokens for batch in batches) == parts[0].tokens
    assert sum(batch.tokens_saved for batch in batches) == parts[0].tokens_saved
    for batch in batches:
        check_form(batch, pack_tokens)
        assert (batch.pair_B is not None) == paired
        if paired:
            assert len(batch.pair_B) % 2 == 0
            assert batch.pair_B[::2].tolist() == batch.pair_B[1::2].tolist()
            real = batch.document_B >= 0
            assert (batch.document_B[real] % 2).tolist() == [0, 1] * (int(real.sum()) // 2)
            assert (batch.document_B[real] // 2).tolist() == batch.pair_B[real].tolist()
    assert reference.pairs == (len({key[0] for key in expected}) // 2 if paired else 0)


def test_labels_continue_over_a_split_and_first_tokens_are_never_predicted(write_dataset):
    long, short = list(range(100, 141)), [7, 8, 9]
    dataset = write_dataset([long, short])
    batches = make_step(make_plan([dataset]), 0, Packing(WINDOW, 64)).batches
    found = {key[:4] for key in examples(batches)}
    assert found == {(0, p, 100 + p, 101 + p) for p in range(40)} | {(1, 0, 7, 8), (1, 1, 8, 9)}
    batch = batches[0]
    for i, start in enumerate(batch.document_start_B.tolist()):
        segment = batch.document_T == i
        assert batch.positions_T[segment].tolist() == list(range(int(segment.sum())))
        assert int(batch.document_length_B[i]) == (41 if int(batch.document_B[i]) == 0 else 3)
        assert start % 16 == 0


def test_a_places_weight_is_its_labels_weight(write_dataset):
    mask = [False, False, True, True, False, True]
    dataset = write_dataset([[10, 11, 12, 13, 14, 15]], "conversations", [mask])
    batch = make_step(make_plan([dataset]), 0, Packing(WINDOW, 16)).batches[0]
    assert batch.weight_T.tolist() == [0, 1, 1, 0, 1]
    assert batch.labels_T[batch.weight_T > 0].tolist() == [12, 13, 15]
    assert batch.rows_N[:4].tolist() == [1, 2, 4, -1]


SIDES = [[1, 2, 3, 4, 10, 11, 12], [1, 2, 3, 4, 20, 21]]
ANSWERS = [[False] * 4 + [True] * 3, [False] * 4 + [True] * 2]


def test_a_shared_prompt_is_laid_out_once(write_dataset):
    dataset = write_dataset(SIDES, "preferences", ANSWERS, prompts=[4, 4])
    step = make_step(make_plan([dataset], step_size=1, share_prompts=True), 0, Packing(WINDOW, 8))
    (batch,) = step.batches
    assert (step.tokens, step.tokens_saved, step.weight) == (8, 3, 5)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 10, 11, 4, 20]
    assert batch.labels_T.tolist() == [2, 3, 4, 10, 11, 12, 20, 21]
    assert batch.weight_T.tolist() == [0] * 3 + [1] * 5
    assert batch.positions_T.tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert batch.document_T.tolist() == [0] * 6 + [1] * 2
    assert batch.document_B.tolist() == [0, 1]
    assert batch.document_length_B.tolist() == [7, 6]
    assert batch.attention.segments == ((0, 3, -1), (3, 6, 0), (6, 8, 0))


def test_sharing_fits_more_pairs_into_a_pack_and_changes_no_order(write_dataset):
    long, masks = [[1] * 30, [1] * 3], [[False] * 29 + [True], [False] * 2 + [True]]
    dataset = write_dataset(long + SIDES * 4, "preferences", masks + ANSWERS * 4, prompts=[2] * 2 + [4] * 8)
    plans = [make_plan([dataset], step_size=4, share_prompts=share) for share in (False, True)]
    assert [plan.skipped for plan in plans] == [[1], [1]]
    assert [plan.longest_unit for plan in plans] == [11, 8]
    assert [len(make_step(plan, 0, Packing(WINDOW, 16)).batches) for plan in plans] == [4, 2]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert [plan.summary(16)["tokens"] for plan in plans] == [44, 32]
    assert [plan.summary(16)["tokens_saved"] for plan in plans] == [0, 12]
    assert "32 tokens (12 saved by shared prompts); packs of 16 are 100.0% full" in plans[1].describe(16)[-1]
    with pytest.raises(ValueError, match=r"both sides of the longest pair \(8 places\)"):
        make_step(plans[1], 0, Packing(WINDOW, 7))


def test_document_ids_are_unique_over_sources(write_dataset):
    datasets = [write_dataset([[1, 2], [1, 3, 4]]), write_dataset([[1, 5], [1, 6]])]
    batch = make_step(make_plan(datasets), 0, Packing(WINDOW, 64)).batches[0]
    firsts = batch.document_B[batch.document_T[batch.labels_T >= 5]]
    assert sorted(batch.document_B.tolist()) == [0, 1, 2, 3]
    assert sorted(firsts.tolist()) == [2, 3]


def test_a_rank_without_work_gets_a_filler_of_no_weight(write_dataset):
    for kind, segments in (("text", 1), ("preferences", 2)):
        dataset = write_dataset([[1, 2, 3], [1, 2, 4]], kind, prompts=None if kind == "text" else [2, 2])
        plan = make_plan([dataset], step_size=16, share_prompts=True)
        parts = [make_step(plan, 0, Packing(WINDOW, 64, rank=rank, ranks=4)) for rank in range(4)]
        fillers = [part.batches[0] for part in parts if part.batches[0].tokens == 0]
        assert [len(part.batches) for part in parts] == [1] * 4
        assert len(fillers) == (2 if kind == "text" else 3)
        for filler in fillers:
            check_form(filler, 2)
            assert filler.document_B.tolist() == [-1] * segments
            assert filler.weight_T.sum() == 0


def test_pack_tokens_below_the_longest_unit_is_refused(write_dataset):
    plan = make_plan([write_dataset([list(range(30))])])
    with pytest.raises(ValueError, match="pack_tokens = 15 is below the longest segment"):
        make_step(plan, 0, Packing(WINDOW, 15))
    pairs = make_plan([write_dataset([[1, 2, 3], [1, 2]], "preferences", prompts=[1, 1])])
    with pytest.raises(ValueError, match=r"both sides of the longest pair \(3 places\)"):
        make_step(pairs, 0, Packing(WINDOW, 2))


def equal(a: Batch, b: Batch) -> bool:
    values = [{**vars(batch), "attention": batch.attention.work} for batch in (a, b)]
    tensors = all(torch.equal(x, y) if x is not None else y is None for x, y in zip(*(v.values() for v in values), strict=True))
    return tensors and a.attention.segments == b.attention.segments


def test_the_stream_gives_the_steps_of_make_step_from_any_start(write_dataset, random_documents):
    plan = make_plan([write_dataset(random_documents(60, 40))])
    assert plan.steps > 6
    for start, prefetch in ((0, 1), (3, 2), (plan.steps - 1, 10), (plan.steps, 2)):
        steps = list(step_stream(plan, start, Packing(WINDOW, 32, rank=1, ranks=2), prefetch=prefetch))
        assert [step.index for step in steps] == list(range(start, plan.steps))
        for step in steps:
            direct = make_step(plan, step.index, Packing(WINDOW, 32, rank=1, ranks=2))
            assert (step.weight, step.tokens) == (direct.weight, direct.tokens)
            assert all(equal(a, b) for a, b in zip(step.batches, direct.batches, strict=True))


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name == "step_stream"]


def test_closing_the_stream_ends_its_thread(write_dataset, random_documents):
    plan = make_plan([write_dataset(random_documents(60, 40))])
    stream = step_stream(plan, 0, Packing(WINDOW, 32), prefetch=1)
    next(stream)
    assert len(stream_threads()) == 1
    stream.close()
    assert stream_threads() == []
    step_stream(plan, 0, Packing(WINDOW, 32)).close()
    assert stream_threads() == []


def test_errors_of_the_thread_reach_the_consumer(write_dataset, random_documents, monkeypatch):
    plan = make_plan([write_dataset(random_documents(60, 40))])
    units = plan.units

    def failing(step):
        if step == 2:
            raise OSError("the disk is gone")
        return units(step)

    monkeypatch.setattr(plan, "units", failing)
    stream = step_stream(plan, 0, Packing(WINDOW, 32))
    assert [next(stream).index, next(stream).index] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert stream_threads() == []


def test_evaluation_sees_every_document_once_in_order(write_dataset, random_documents):
    documents = random_documents(30, 50)
    dataset = write_dataset(documents)
    batches = evaluation_batches(dataset, Packing(WINDOW, 40), 16)
    for batch in batches:
        check_form(batch, 40)
    expected = {(d, p, ids[p], ids[p + 1]) for d, ids in enumerate(documents) for p in range(len(ids) - 1)}
    found = examples(batches)
    assert {key[:4] for key in found} == expected
    assert found.total() == len(expected)
    order = [document for batch in batches for document in batch.document_B.tolist()]
    assert order == sorted(order)
    first = evaluation_batches(dataset, Packing(WINDOW, 40), 16, limit=4)
    assert {key[0] for key in examples(first)} == {0, 1, 2, 3}


def test_evaluation_sees_every_pair_that_fits_once_in_order(write_dataset):
    dataset = write_dataset([[1] * n for n in (4, 5, 30, 3, 6, 6)], "preferences", prompts=[1] * 6)
    with pytest.warns(UserWarning, match="1 of 3 pairs are longer than context_length = 16"):
        batches = evaluation_batches(dataset, Packing(WINDOW, 16), 16)
    assert [batch.pair_B.tolist() for batch in batches] == [[0, 0], [2, 2]]
    dataset = write_dataset(SIDES * 3, "preferences", ANSWERS * 3, prompts=[4] * 6)
    apart = evaluation_batches(dataset, Packing(WINDOW, 16), 16)
    together = evaluation_batches(dataset, Packing(WINDOW, 16), 16, share_prompts=True)
    assert [batch.pair_B.tolist() for batch in apart] == [[0, 0], [1, 1], [2, 2]]
    assert [batch.pair_B.tolist() for batch in together] == [[0, 0, 1, 1], [2, 2]]
    assert examples(apart) == examples(together)
    (first,) = evaluation_batches(dataset, Packing(WINDOW, 16), 16, share_prompts=True, limit=1)
    assert (first.pair_B.tolist(), first.tokens, first.tokens_saved) == ([0, 0], 8, 3)
    with pytest.raises(ValueError, match="pack_tokens = 6"):
        evaluation_batches(dataset, Packing(WINDOW, 6), 40)
    with pytest.raises(ValueError, match="limit = 0"):
        evaluation_batches(dataset, Packing(WINDOW, 60), 40, limit=0)
    with pytest.warns(UserWarning, match="3 of 3"), pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluation_batches(dataset, Packing(WINDOW, 60), 2)
    first_too_long = write_dataset([[1] * n for n in (30, 5, 3, 4)], "preferences", prompts=[1] * 4)
    with pytest.warns(UserWarning, match="1 of 2"), pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluation_batches(first_too_long, Packing(WINDOW, 60), 16, limit=1)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("kind", ["conversations", "preferences"])
def test_evaluation_counts_are_sums_over_its_batches_and_nothing_is_collated(
    kind, share_prompts, write_dataset, random_documents, monkeypatch
):
    documents = random_documents(20, 16)
    trained = [[place % 3 > 0 for place in range(len(ids))] for ids in documents]
    prompts = None
    if kind == "preferences":
        documents, prompts = with_common_beginnings(documents, np.random.default_rng(0))
        trained = [[place >= prompt for place in range(len(ids))] for ids, prompt in zip(documents, prompts, strict=True)]
    batches = evaluation_batches(
        write_dataset(documents, kind, trained, prompts=prompts), Packing(WINDOW, 40), 16, share_prompts=share_prompts
    )
    for part in (batches, batches[1::2]):
        made = list(part)
        monkeypatch.setattr("engine.data.batch._collate", None)
        step = part.as_step()
        monkeypatch.undo()
        assert step.weight == step.trained == sum(float(batch.weight_T.sum()) for batch in made)
        assert step.pairs == (sum(len(batch.pair_B) // 2 for batch in made) if kind == "preferences" else 0)
        assert step.tokens == part.tokens == sum(batch.tokens for batch in made)
        assert step.tokens_saved == sum(batch.tokens_saved for batch in made)
        assert step.attended == sum(pairs_of(batch.attention) for batch in made)


def test_ranks_share_an_evaluation_and_lack_no_collective(write_dataset, random_documents):
    batches = evaluation_batches(write_dataset(random_documents(30, 16)), Packing(WINDOW, 40), 16)
    assert len(batches) % 3 == 2
    shares = [list(share_of(batches, rank, 3)) for rank in range(3)]
    assert {len(share) for share in shares} == {-(-len(batches) // 3)}
    assert [int(share[-1].document_B[0]) < 0 for share in shares] == [False, False, True]
    whole = [shares[index % 3][index // 3] for index in range(len(batches))]
    for alone, shared in zip(batches, whole, strict=True):
        assert torch.equal(alone.tokens_T, shared.tokens_T)
        assert torch.equal(alone.document_B, shared.document_B)


class ManyPairs:
    """A hundred thousand synthetic pairs of 64 places each, which take no memory."""

    kind, folder, count = "preferences", "many", 100_000
    lengths = np.broadcast_to(np.int64(33), (2 * count,))
    shared_places = np.broadcast_to(np.int64(9), (count,))

    def __len__(self):
        return 2 * self.count

    def tokens(self, document):
        return np.full(33, document % 340, dtype=np.uint32)

    def trained(self, document, start=0, stop=None):
        return (np.arange(33) >= 10)[start:stop]


def test_a_hundred_thousand_pairs_cost_a_rank_what_it_works_on():
    list(share_of(evaluation_batches(ManyPairs(), Packing(WINDOW, 4096), 32), 0, 512))  # first calls load modules
    tracemalloc.start()
    batches = evaluation_batches(ManyPairs(), Packing(WINDOW, 4096), 32, share_prompts=True)
    held, peak = tracemalloc.get_traced_memory()
    assert held < 16 * ManyPairs.count
    assert peak < 64 * ManyPairs.count
    tracemalloc.reset_peak()
    seen = 0
    for batch in share_of(batches, 3, 128):
        assert set(batch.tokens_T.tolist()) <= {document % 340 for document in batch.document_B.tolist()}
        seen += len(batch.pair_B) // 2
    held_after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen > ManyPairs.count / 130
    # All of the rank's micro-batches together are 41 bytes x 55 places x `seen` = 1.8 MB, the whole set's are 225 MB.
    assert held_after - held < 2**20
    assert peak - held < 2**20


@pytest.mark.parametrize(
    ("places", "pack_tokens", "padded"),
    [
        (1, 8192, 128),
        (128, 8192, 128),
        (129, 8192, 256),
        (7552, 8192, 7552),
        (7553, 8192, 8192),
        (8192, 8192, 8192),
        (100, 100, 128),
        (5, 100, 128),
        (1000, 1010, 1024),
        (900, 1010, 1024),
    ],
)
def test_padding_fills_a_tile_or_a_nearly_full_pack(places, pack_tokens, padded):
    """A tile has 128 rows. A pack with less than a sixteenth of its tokens free is filled."""
    assert padded_places(places, pack_tokens) == padded


def test_padding_belongs_to_no_document(write_dataset, random_documents):
    plan = make_plan([write_dataset(random_documents(40, 60, 3))], step_size=300)
    for step in range(plan.steps):
        plain, padded = (make_step(plan, step, Packing(WINDOW, 280, pad=pad)) for pad in (False, True))
        assert {len(batch.tokens_T) for batch in padded.batches} <= {128, 256, 384}
        assert vars(replace(padded, batches=[])) == vars(replace(plain, batches=[]))
        for batch, without in zip(padded.batches, plain.batches, strict=True):
            places = len(without.tokens_T)
            assert batch.tokens == without.tokens == places
            assert batch.attention.tokens == len(batch.tokens_T)
            assert not batch.weight_T[places:].any()
            cut = {f"{name}_T": getattr(batch, f"{name}_T")[:places] for name in PLACED}
            assert equal(replace(batch, **cut, attention=without.attention), without)
            # Attention visits nothing behind the documents.
            assert max(end for _, end, _ in batch.attention.queries()) == len(batch.tokens_T)
            assert all(stop <= places for _, _, ranges in batch.attention.queries() for _, stop, _ in ranges)


def test_to_keeps_the_content_of_a_batch(write_dataset):
    batch = make_step(make_plan([write_dataset([[1, 2, 3]])]), 0, Packing(WINDOW, 16)).batches[0]
    assert equal(batch.to("cpu"), batch)


@pytest.mark.gpu
def test_a_batch_moves_to_cuda_and_back(write_dataset):
    batch = make_step(make_plan([write_dataset([[1, 2, 3]])]), 0, Packing(WINDOW, 16)).batches[0]
    moved = batch.to("cuda")
    assert moved.tokens_T.is_cuda
    assert equal(moved.to("cpu"), batch)
