"""Ask a model the example's questions: how likely is an accepted answer, and does greedy decoding give one exactly?

Nothing is generated. Greedy decoding gives an answer exactly if every token of that answer, fed in, is the likeliest at its
place. So one packed forward pass answers for many questions.

Shapes: T tokens, N rows of answer tokens, V vocabulary, B documents (a question with one accepted answer), D width.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch

from model.mistral import Mistral, packed_attention
from model.vocabulary.chat import encode_chat, encode_prompt
from model.vocabulary.tokenizer import Tokenizer
from recipes.example.facts import KINDS, LANGUAGES
from recipes.example.text import Question

# Few enough that the logits' memory is used again: glibc maps more than 32 MiB anew each time.
PACK_TOKENS = 768


@dataclass(frozen=True)
class Outcome:
    """A question's result."""

    question: Question
    loss: float  # -log of the probability of the accepted answers together, nats
    exact: bool  # greedy decoding gives an accepted answer, its end token included
    polite: bool  # greedy decoding gives the polite answer


@dataclass(frozen=True)
class Score:
    """The result over all questions of one language and kind."""

    questions: int
    loss: float  # mean, nats per answer
    exact: float  # share of the questions
    polite: float | None  # share of the exact answers, None without exact answers


@dataclass(frozen=True)
class _Document:
    ids: list[int]
    answer: int  # where the answer begins


def ask(model: Mistral, tokenizer: Tokenizer, questions: list[Question], *, chat: bool) -> list[Outcome]:
    """Ask each question: through the chat template, where both registers are accepted, or as plain text to continue."""
    documents: list[_Document] = []
    for question in questions:
        if chat:
            documents += [_chat_document(tokenizer, question, polite) for polite in (False, True)]
        else:
            documents.append(_text_document(tokenizer, question))
    log_probs, greedy = _score(model, documents)
    ways = 2 if chat else 1
    outcomes = []
    for place, question in enumerate(questions):
        of_question = slice(ways * place, ways * (place + 1))
        chosen = greedy[of_question]
        loss = -float(torch.tensor(log_probs[of_question], dtype=torch.float64).logsumexp(0))
        outcomes.append(Outcome(question, loss, any(chosen), chat and chosen[1]))
    return outcomes


def score(outcomes: list[Outcome]) -> dict[tuple[str, str], Score]:
    """(language, kind) -> Score; a language and kind without questions is left out."""
    scores = {}
    for language in LANGUAGES:
        for kind in KINDS:
            some = [o for o in outcomes if o.question.language == language and o.question.item.kind == kind]
            if some:
                exact = sum(outcome.exact for outcome in some)
                polite = sum(outcome.polite for outcome in some) / exact if exact else None
                loss = sum(outcome.loss for outcome in some) / len(some)
                scores[language, kind] = Score(len(some), loss, exact / len(some), polite)
    return scores


def _chat_document(tokenizer: Tokenizer, question: Question, polite: bool) -> _Document:
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": question.text}])
    answered = encode_chat(
        tokenizer,
        [{"role": "user", "content": question.text}, {"role": "assistant", "content": question.answer(polite)}],
    )
    return _joined(prompt, answered.ids, question)


def _text_document(tokenizer: Tokenizer, question: Question) -> _Document:
    prompt, document = (tokenizer.encode(text) for text in (question.prompt, question.document))
    return _joined([tokenizer.bos_id, *prompt], [tokenizer.bos_id, *document, tokenizer.eos_id], question)


def _joined(prompt: list[int], ids: list[int], question: Question) -> _Document:
    # Otherwise a model that continues the prompt could not spell the answer in the pieces of its training.
    assert ids[: len(prompt)] == prompt, f"a piece joins question and answer: {question.text}"
    return _Document(ids, len(prompt))


@torch.no_grad()
def _score(model: Mistral, documents: list[_Document]) -> tuple[list[float], list[bool]]:
    """(each answer's log-probability, whether all of an answer's tokens are the likeliest at their places)."""
    log_probs: list[float] = []
    greedy: list[bool] = []
    model.eval()
    start = 0
    while start < len(documents):
        end, tokens = start, 0
        while end < len(documents) and (end == start or tokens + len(documents[end].ids) <= PACK_TOKENS):
            tokens += len(documents[end].ids)
            end += 1
        log_prob_B, greedy_B = _score_pack(model, documents[start:end])
        log_probs += log_prob_B.tolist()
        greedy += greedy_B.tolist()
        start = end
    return log_probs, greedy


def _score_pack(model: Mistral, documents: list[_Document]) -> tuple[torch.Tensor, torch.Tensor]:
    device = model.lm_head.weight.device
    lengths = [len(document.ids) - 1 for document in documents]
    bounds = [0, *accumulate(lengths)]
    rows, owner, labels = [], [], []
    for index, document in enumerate(documents):
        for place in range(document.answer - 1, lengths[index]):
            rows.append(bounds[index] + place)
            owner.append(index)
            labels.append(document.ids[place + 1])
    tokens_T = torch.tensor([id for document in documents for id in document.ids[:-1]], device=device)
    positions_T = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths]).to(device)
    cu_docs = torch.tensor(bounds, dtype=torch.int32, device=device)
    hidden_TD = model(tokens_T, positions_T, packed_attention(cu_docs, model.config.sliding_window))
    logits_NV = model.logits(hidden_TD[torch.tensor(rows, device=device)])
    label_N = torch.tensor(labels, device=device)
    # On a CPU a maximum is three times as fast as its place, and new memory for each pass as slow as the product.
    likeliest_N = logits_NV.gather(1, label_N[:, None])[:, 0] == logits_NV.amax(dim=-1)
    torch.log_softmax(logits_NV, dim=-1, out=logits_NV)
    log_prob_N = logits_NV.gather(1, label_N[:, None])[:, 0]
    owner_N = torch.tensor(owner, device=device)
    log_prob_B = torch.zeros(len(documents), device=device).index_add(0, owner_N, log_prob_N)
    wrong_B = torch.zeros(len(documents), device=device).index_add(0, owner_N, (~likeliest_N).float())
    return log_prob_B.cpu(), (wrong_B == 0).cpu()
