"""Answers of a model in training to the prompts of a file."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from engine.distributed.ranks import Ranks
from engine.inference.generation import Prompt, generate_many
from engine.inference.prompts import FilePrompt
from model.mistral import Mistral
from model.sampling import Sampling
from model.vocabulary.chat import ends_of
from model.vocabulary.tokenizer import Tokenizer

# Answers that a rank generates at once: matrix products are padded to as many rows anyway.
ROWS = 16


class Samples:
    """Prompts that are answered anew at each evaluation, each with the same seed every time."""

    def __init__(
        self,
        prompts: Sequence[FilePrompt],
        sampling: Sampling,  # the seed of the first prompt; the next prompts have the next seeds
        tokenizer: Tokenizer,
        ranks: Ranks,
        pack_tokens: int,  # prompt tokens that are read at once
    ) -> None:
        self._prompts, self._sampling, self._tokenizer, self._ranks = prompts, sampling, tokenizer, ranks
        self._pack_tokens = pack_tokens

    def answer(
        self,
        model: Mistral,  # with whole weights
        alive: Callable[[], None],  # called after each token, as a sign of life
        stopping: Callable[[], bool],  # whether to give up; all ranks call it equally often
    ) -> list[dict[str, str]] | None:
        """{"prompt", "answer"} of each prompt, in the file's order, on every rank. All ranks call it and share the prompts.

        Returns: None where it gave up.
        """
        ends = ends_of(self._tokenizer, model.config)
        ranks, answers = self._ranks, []
        wave = ROWS * ranks.ranks
        for first in range(0, len(self._prompts), wave):
            if stopping():
                return None
            numbers = range(first + ranks.rank, min(first + wave, len(self._prompts)), ranks.ranks)
            answers += self._answers(model, numbers, ends, alive)
        texts = dict(ranks.gather(answers))
        return [{"prompt": prompt.text, "answer": texts[number]} for number, prompt in enumerate(self._prompts)]

    def _answers(
        self, model: Mistral, numbers: Sequence[int], ends: frozenset[int], alive: Callable[[], None]
    ) -> list[tuple[int, str]]:
        """(number, answer) of these prompts."""
        asked = [
            Prompt(self._prompts[number].ids, replace(self._sampling, seed=self._sampling.seed + number), ends)
            for number in numbers
        ]
        grown: dict[int, list[int]] = defaultdict(list)
        try:
            for token in generate_many(model, asked, rows=ROWS, pack_tokens=self._pack_tokens):
                alive()
                grown[token.number].append(token.token)
        except ValueError as error:
            # A model that has diverged has no answers; the losses in the log say more, and decide about the run.
            return [(number, f"(no answer: {error})") for number in numbers]
        return [(number, self._tokenizer.decode(grown[at]).strip(" ")) for at, number in enumerate(numbers)]
