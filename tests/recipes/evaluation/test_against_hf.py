"""Every request of four tasks against the harness's `hf` backend on the same exported folder; and what sharing prefixes saves.

To measure the CPU seconds of both side by side, on an idle machine (the last test prints them, and the shares of places):

    OMP_NUM_THREADS=1 python -m pytest -m slow --capture=no tests/recipes/evaluation/test_against_hf.py
"""

import time

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with the extra eval")
pytest.importorskip("accelerate", reason="the harness's hf backend needs accelerate (pip install accelerate)")
pytest.importorskip("rapidfuzz", reason="rapidfuzz comes with the extra eval")

from engine.inference.scoring import Request, Scoring, default_pack_tokens
from model.config import MistralConfig
from model.mistral import Mistral, initialize
from model.vocabulary.export import write_tokenizer_folder
from model.vocabulary.tokenizer import Tokenizer, mistral_tokenizer_path
from model.weights import save_model
from recipes.evaluation.benchmarks import load_suite
from recipes.evaluation.encoding import Encoder
from recipes.evaluation.harness import KomainuLM
from recipes.evaluation.ledger import Ledger

pytestmark = pytest.mark.slow
TASKS = {"hellaswag": 16, "jcommonsenseqa": 40, "jmmlu": 48, "jsquad_likelihood": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(layers, width) -> an exported model with Mistral's tokenizer."""
    pytest.importorskip("mistral_common", reason="the tokenizer comes with mistral-common")

    def make(layers: int, width: int):
        config = MistralConfig(
            vocab_size=32000,
            hidden_size=width,
            intermediate_size=43 * width // 16,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 128,
            head_dim=64,
            sliding_window=4096,
            max_position_embeddings=8192,
            initializer_range=0.05,
        )
        model = Mistral(config)
        initialize(model, 0)
        folder = tmp_path_factory.mktemp("exported")
        save_model(model, folder)
        write_tokenizer_folder(folder, mistral_tokenizer_path().read_bytes())
        return folder, model.requires_grad_(False)

    return make


def requests_of(shared_data, name: str, limit: int | None):
    """The harness's own requests of a task's first items."""
    suite = load_suite([f"{name}.yaml"], shared_data / "bench")
    (task,) = suite.loaded["tasks"].values()
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances


def hf_of(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


@pytest.mark.parametrize("name", TASKS)
def test_log_likelihoods_and_greedy_flags_are_those_of_hf(name, shared_data, folders, tmp_path):
    folder, model = folders(2, 128)
    instances = requests_of(shared_data, name, TASKS[name])
    with Ledger(tmp_path / "journal.jsonl", {}) as ledger:
        lm = KomainuLM(model, Tokenizer.load(folder), ledger, pack_tokens=8192, rows=32)
        ours = lm.loglikelihood(instances)
    theirs = hf_of(folder).loglikelihood(instances, disable_tqdm=True)
    assert lm.counts.joined == 0
    worst = max(abs(one[0] - two[0]) for one, two in zip(ours, theirs, strict=True))
    print(f"\n{name}: {len(ours)} requests, largest difference {worst:.2g}, places {lm.counts.places_alone}/{lm.counts.places}")
    assert worst < 1e-4
    assert [one[1] for one in ours] == [bool(two[1]) for two in theirs]


@pytest.mark.parametrize(("name", "items", "times"), [("hellaswag", 200, 3.8), ("jmmlu", 1500, 20)])
def test_shared_prefixes_save_places(name, items, times, shared_data):
    pytest.importorskip("mistral_common", reason="the tokenizer comes with mistral-common")
    encoder = Encoder(Tokenizer(mistral_tokenizer_path().read_bytes()))
    pairs = encoder.pairs([instance.args for instance in requests_of(shared_data, name, items)])
    requests = [Request(pair.context, pair.continuation) for pair in pairs]
    plan = Scoring(requests, pack_tokens=default_pack_tokens(torch.device("cpu")), longest=8192)
    print(f"\n{name}, {items} items: {plan.places_alone:,} places / {plan.places:,} = {plan.places_alone / plan.places:.2f}")
    assert plan.places_alone >= times * plan.places


def test_a_larger_model_gives_the_scores_of_hf_and_both_print_their_cpu_seconds(shared_data, folders, tmp_path):
    """8 layers x 512."""
    folder, model = folders(8, 512)
    hf, tokenizer = hf_of(folder), Tokenizer.load(folder)
    for name, items in (("hellaswag", 16), ("jmmlu", 48)):
        instances = requests_of(shared_data, name, items)
        start = time.process_time()
        theirs = hf.loglikelihood(instances, disable_tqdm=True)
        middle = time.process_time()
        with Ledger(tmp_path / f"{name}.jsonl", {}) as ledger:
            ours = KomainuLM(model, tokenizer, ledger, pack_tokens=8192, rows=32).loglikelihood(instances)
        end = time.process_time()
        print(f"\n{name}, {items} items: hf {middle - start:.2f} CPU s, ours {end - middle:.2f}")
        assert [one[0] for one in ours] == pytest.approx([two[0] for two in theirs], abs=1e-4)
