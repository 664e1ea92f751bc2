"""The model against `transformers`' MistralForCausalLM, and which tokens may change which logits."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralForCausalLM
from transformers import MistralConfig as ReferenceConfig

from model.config import PRESETS, MistralConfig
from model.mistral import Mistral, initialize, packed_attention
from model.weights import load_model, save_model

WINDOWS = [1, 5, None]
HEADS = [(4, 2), (4, 1), (4, 4)]
LENGTHS = [3, 23]


def logits_of(model: Mistral, *documents: torch.Tensor) -> torch.Tensor:
    """Logits of every token of the documents, packed into one row."""
    lengths = torch.tensor([0] + [len(document) for document in documents])
    attend = packed_attention(lengths.cumsum(0).int(), model.config.sliding_window)
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    with torch.no_grad():
        return model.logits(model(torch.cat(documents), positions, attend))


def reference_logits(reference, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return reference(tokens[None]).logits[0]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float32
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def random_tokens(length: int, seed: int = 1, vocab_size: int = 64) -> torch.Tensor:
    return torch.randint(vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_logits_equal_transformers_on_a_folder_that_we_saved(small_model, reference_of, window, heads, kv_heads):
    model = small_model(sliding_window=window, num_attention_heads=heads, num_key_value_heads=kv_heads)
    reference = reference_of(model)
    assert reference.config.sliding_window == window
    for length in LENGTHS:
        tokens = random_tokens(length)
        assert_same(logits_of(model, tokens), reference_logits(reference, tokens))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_logits_equal_transformers_on_a_folder_that_it_saved(tmp_path, window, heads, kv_heads):
    torch.manual_seed(0)
    # Here the head size follows from the width, and the rotary base differs.
    reference = MistralForCausalLM(
        ReferenceConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            sliding_window=window,
            initializer_range=0.3,
            rms_norm_eps=1e-6,
            max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            attn_implementation="eager",
        )
    ).eval()
    with torch.no_grad():
        for norm in (parameter for parameter in reference.parameters() if parameter.ndim == 1):
            norm.uniform_(0.5, 1.5)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config.rope_theta == 500.0
    for length in LENGTHS:
        tokens = random_tokens(length, vocab_size=61)
        assert_same(logits_of(model, tokens), reference_logits(reference, tokens))


def test_bfloat16_is_as_near_to_the_exact_logits_as_transformers_is(small_model, tmp_path):
    model = small_model(sliding_window=5).to(torch.bfloat16)
    save_model(model, tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reference.dtype == torch.bfloat16
    tokens = random_tokens(23)
    ours, theirs = logits_of(model, tokens), reference_logits(reference, tokens).float()
    exact = logits_of(load_model(tmp_path, dtype=torch.float64), tokens)
    # The two round at different steps; ours must be as near to the exact logits as theirs.
    assert (ours - exact).square().mean() <= 1.5 * (theirs - exact).square().mean()


def test_padding_rows_have_no_logit(small_model, reference_of):
    model = small_model(vocab_size=128, unpadded_vocab_size=100)
    tokens = random_tokens(9)
    ours = logits_of(model, tokens)
    assert ours.shape == (9, 100)
    assert_same(ours, reference_logits(reference_of(model), tokens)[:, :100].contiguous())


@pytest.mark.parametrize("window", WINDOWS)
def test_packed_documents_have_the_logits_of_each_document_alone(small_model, window):
    model = small_model(sliding_window=window).to(torch.float64)
    documents = [random_tokens(length, seed=length) for length in (7, 1, 19, 2, 300)]
    packed = logits_of(model, *documents)
    alone = torch.cat([logits_of(model, document) for document in documents])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-11)


def changed(tokens: torch.Tensor, place: int) -> torch.Tensor:
    other = tokens.clone()
    other[place] = (other[place] + 1) % 64
    return other


@pytest.mark.parametrize("window", WINDOWS)
def test_a_token_changes_the_logits_of_its_window_and_no_other_bit(small_model, window):
    """In a model of one layer, a token changes its own logits and those of the next window - 1 tokens."""
    model = small_model(sliding_window=window, num_hidden_layers=1)
    tokens, place = random_tokens(20), 6
    before, after = logits_of(model, tokens), logits_of(model, changed(tokens, place))
    last = 19 if window is None else place + window - 1
    differs = (before != after).any(dim=1).tolist()
    assert differs == [place <= row <= last for row in range(20)]


@pytest.mark.parametrize("window", WINDOWS)
def test_other_documents_and_the_future_cannot_change_a_logit(small_model, window):
    model = small_model(sliding_window=window)
    first, second, third = random_tokens(6, 1), random_tokens(8, 2), random_tokens(5, 3)
    before = logits_of(model, first, second, third)
    for documents in ((changed(first, 5), second, third), (first, second, changed(third, 0))):
        after = logits_of(model, *documents)
        assert torch.equal(before[6:14], after[6:14])
        assert not torch.equal(before, after)
    after = logits_of(model, first, changed(second, 7), third)
    assert torch.equal(before[:13], after[:13])
    assert torch.equal(before[14:], after[14:])
    assert not torch.equal(before[13], after[13])


def test_log_probs_equal_those_of_transformers(small_model, reference_of):
    model = small_model(vocab_size=128, unpadded_vocab_size=100)
    tokens = random_tokens(12)
    targets = random_tokens(12, seed=5)
    rows = torch.tensor([0, 3, 11, -1, -1], dtype=torch.int32)
    hidden = model(tokens, torch.arange(12), packed_attention(torch.tensor([0, 12]), 5))
    ours = model.log_probs(hidden, targets, rows)
    theirs = reference_logits(reference_of(model), tokens)[:, :100].double().log_softmax(-1)
    expected = torch.zeros(12, dtype=torch.float64)
    for row in (0, 3, 11):
        expected[row] = theirs[row, targets[row]]
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-5)


def test_initialisation_is_a_function_of_the_seed(small_model):
    torch.manual_seed(1)
    first = small_model(seed=3).state_dict()
    torch.manual_seed(2)
    again, other = small_model(seed=3).state_dict(), small_model(seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == (first[name].ndim == 1) for name in first)


def test_initialisation_has_the_documented_spread():
    config = MistralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.1,
    )
    model = Mistral(config)
    initialize(model, 0)
    for name, parameter in model.requires_grad_(False).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        # 1 / sqrt(2 layers) for what writes to the residual stream.
        spread = 0.1 * (0.25 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
        assert float(parameter.std()) == pytest.approx(spread, rel=0.05), name
        assert abs(parameter.mean()) < 0.05 * spread, name


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS.keys())
def test_the_parameter_count_equals_that_of_the_modules(config):
    with torch.device("meta"):
        model = Mistral(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.parameters
