"""A model of ours in lm-evaluation-harness: its three kinds of requests, computed in packs, each kept in a ledger when done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from engine.inference.generation import Prompt, answers
from engine.inference.scoring import Request, Scoring, shortened
from model.mistral import Mistral
from model.sampling import Sampling
from model.vocabulary.chat import ends_of, prompt_text
from model.vocabulary.tokenizer import Tokenizer
from recipes.evaluation.encoding import Encoder, Pair, StopTexts, cut_at
from recipes.evaluation.ledger import Results

# The harness's own default.
_MOST_NEW_TOKENS = 256
# Texts of a pack of generations, as a multiple of the rows: rows that end early are filled again.
_WAVES = 4


@dataclass
class Counts:
    """What an evaluation computed, and where texts did not fit."""

    requests: int = 0
    places: int = 0  # computed for log-likelihoods
    places_alone: int = 0  # that one request at a time would have taken
    generated: int = 0  # answers
    joined: int = 0  # continuations that a piece would have joined to their context: encoded alone
    truncated: int = 0  # contexts that lost tokens on the left


class KomainuLM(TemplateLM):
    """The harness's view of a model."""

    def __init__(
        self,
        model: Mistral,
        tokenizer: Tokenizer,
        ledger: Results,
        *,
        pack_tokens: int,
        rows: int,
        chat: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model, self.our_tokenizer, self.ledger = model, tokenizer, ledger
        self.pack_tokens, self.rows, self.seed = pack_tokens, rows, seed
        self.encoder = Encoder(tokenizer, chat=chat)
        self.counts = Counts()
        self._ends = ends_of(tokenizer, model.config)

    @property
    def eot_token_id(self) -> int:
        return self.our_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.our_tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        return self.our_tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        (ids,) = self.encoder.texts([string])
        return ids if add_special_tokens is not False else ids[1:]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return prompt_text(self.our_tokenizer, chat_history)  # type: ignore[arg-type]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self.our_tokenizer.template
        return "llama-2" if template is None else template.source

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = self.encoder.pairs([request.args for request in requests])
        self.counts.joined += sum(pair.joined for pair in pairs)
        return self._scores("loglikelihood", pairs)

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        return self._scores("loglikelihood", [Pair(context, own, False) for _, context, own in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts; longer ones in windows, each token predicted once."""
        windows: list[Pair] = []
        owners: list[int] = []
        for number, ids in enumerate(self.encoder.texts([request.args[0] for request in requests])):
            parts = utils.get_rolling_token_windows(ids[1:], self.prefix_token_id, self.max_length, context_len=1)
            for context, own in map(utils.make_disjoint_window, parts):
                windows.append(Pair(context, own, False))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_likelihood, _) in zip(owners, self._scores("loglikelihood_rolling", windows), strict=True):
            totals[number] += log_likelihood
        return totals

    def _scores(self, kind: str, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        # A continuation without tokens is certain.
        asked = [number for number, pair in enumerate(pairs) if pair.continuation]
        requests = [Request(pairs[number].context, pairs[number].continuation) for number in asked]
        fitted = [shortened(request, self.max_length) for request in requests]
        self.counts.truncated += sum(one is not two for one, two in zip(requests, fitted, strict=True))
        plan = Scoring(fitted, pack_tokens=self.pack_tokens, longest=self.max_length)
        self.counts.requests += len(pairs)
        self.counts.places += plan.places
        self.counts.places_alone += plan.places_alone
        done = self.ledger.plan(kind, ([*request.context, -1, *request.continuation] for request in fitted), len(plan.packs))
        with _progress(plan.places, "places") as bar:
            for number, pack in enumerate(plan.packs):
                if number not in done:
                    found = plan.score(self.model, pack)
                    self.ledger.add(kind, number, [[at, score.log_likelihood, score.greedy] for at, score in found.items()])
                bar.update(pack.places)
        results = [(0.0, True)] * len(pairs)
        for at, log_likelihood, greedy in self.ledger.results(kind):
            results[asked[at]] = (log_likelihood, greedy)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        kind = "generate_until"
        asked = list(self._prompts(requests))
        self.counts.requests += len(asked)
        self.counts.generated += len(asked)
        # Answers of one pack start together; texts of like length end together.
        order = sorted(range(len(asked)), key=lambda number: (-len(asked[number][0].ids), number))
        size = _WAVES * self.rows
        packs = [order[start : start + size] for start in range(0, len(order), size)]
        done = self.ledger.plan(kind, ([vars(prompt.sampling), *prompt.ids, *stops] for prompt, stops in asked), len(packs))
        with _progress(len(asked), "answers") as bar:
            for number, pack in enumerate(packs):
                if number in done:
                    bar.update(len(pack))
                    continue
                found = {}
                for answer in answers(self.model, [asked[at][0] for at in pack], rows=self.rows):
                    at = pack[answer.number]
                    found[at] = cut_at(self.our_tokenizer.decode(answer.ids), asked[at][1])
                    bar.update()
                self.ledger.add(kind, number, sorted(found.items()))
        texts = dict(self.ledger.results(kind))
        return [texts[number] for number in range(len(asked))]

    def _prompts(self, requests: list[Instance]) -> Iterator[tuple[Prompt, list[str]]]:
        """Each request as a prompt, with the texts that end its answer."""
        encoded = self.encoder.texts([request.args[0] for request in requests])
        for number, (request, ids) in enumerate(zip(requests, encoded, strict=True)):
            sampling, stops = read_options(request.args[1])
            sampling = replace(sampling, seed=self.seed + number if sampling.temperature else self.seed)
            room = self.max_length - sampling.max_new_tokens
            if room < 2:
                raise ValueError(
                    f"answers of {sampling.max_new_tokens} tokens leave no room for a question: the model has "
                    f"{self.max_length} positions; lower max_gen_toks in the task's generation_kwargs"
                )
            if len(ids) > room:
                self.counts.truncated += 1
                ids = [ids[0], *ids[len(ids) - room + 1 :]]
            yield Prompt(ids, sampling, self._ends, StopTexts(self.our_tokenizer, stops)), stops


def read_options(options: dict[str, Any]) -> tuple[Sampling, list[str]]:
    """A task's generation options as sampler settings and the texts that end an answer; greedy unless `do_sample` is true.

    Raises: ValueError for an option that the sampler does not have.
    """
    given = dict(options)
    until = given.pop("until", None) or []
    stops = [until] if isinstance(until, str) else list(until)
    new_tokens = given.pop("max_gen_toks", given.pop("max_new_tokens", _MOST_NEW_TOKENS))
    temperature = float(given.pop("temperature", 1.0) or 0.0)
    sampled = bool(given.pop("do_sample", False)) and temperature > 0
    known = {name: given.pop(name) for name in ("top_k", "top_p", "min_p", "repetition_penalty") if name in given}
    if given:
        raise ValueError(
            f"generation option {next(iter(given))}: unknown; known are do_sample, temperature, top_k, top_p, min_p"
        )
    if not sampled:
        known = {name: value for name, value in known.items() if name == "repetition_penalty"}
    return Sampling(temperature=temperature if sampled else 0.0, max_new_tokens=new_tokens, **known), stops


def _progress(total: int, unit: str) -> tqdm:
    return tqdm(total=total, unit=f" {unit}", unit_scale=True, disable=None)
