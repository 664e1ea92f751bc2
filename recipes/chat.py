"""Talk to a model: a conversation, one question (--prompt), or the continuation of a text (--completion).

    python -m recipes.chat runs/dpo
    python -m recipes.chat exports/shisa-7b --system "You are a helpful assistant." --prompt "日本の首都は？"
    python -m recipes.chat mistralai/Mistral-7B-v0.1 --completion --prompt "Once upon a time"
    python -m recipes.chat runs/dpo --prompt "Name a colour." --choices 8

Answers stream to standard output, remarks go to standard error. In a conversation each line is a question, or a command:
/help names them (/set temperature 0.7, /system TEXT, /again and others). Ctrl-D (end of input) ends the conversation; Ctrl-C
ends an answer or, at the question, the conversation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from engine.settings.toml import PathName
from model.sampling import Sampling
from model.vocabulary.chat import Message, encode_prompt, ends_of
from model.vocabulary.tokenizer import StreamDecoder, Tokenizer
from recipes.chat_lines import HISTORY, Conversation, questions, remark
from recipes.command import command, with_first

if TYPE_CHECKING:
    from model.mistral import Mistral


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Conversation with a model."""

    model: PathName
    """Run folder (its newest checkpoint), Hugging Face folder, or hub repository owner/name."""
    system: str | None = None
    """System message, in front of the first question."""
    prompt: str | None = None
    """Answer this one question, then end."""
    choices: int = 1
    """Answer the prompt this many times, generated side by side, each with the next seed."""
    completion: bool = False
    """Continue plain text, without the chat template: for base models."""
    show_speed: bool = False
    """Print tokens per second after each answer."""
    history: PathName | None = None
    """File that keeps the questions asked at a terminal for the arrow keys of later conversations; empty: none; default:
    ~/.local/state/komainu/chat_history."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the parameters; auto: bfloat16 on CUDA, float32 on the CPU."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7))
    """Choice of the next token."""

    def __post_init__(self) -> None:
        if self.completion and self.system is not None:
            raise ValueError("system has no effect with completion, which continues plain text; leave one of them out")
        if self.choices < 1:
            raise ValueError(f"choices = {self.choices}: must be at least 1")
        if self.choices > 1 and self.prompt is None:
            raise ValueError(f"choices = {self.choices} answers one prompt several times: add --prompt, or leave it out")
        if self.choices > 1 and self.sampling.temperature == 0:
            raise ValueError(f"choices = {self.choices} would all be the same at sampling.temperature = 0: raise it")


class Speaker:
    """A model with its tokenizer; answers go to standard output."""

    def __init__(self, model: Mistral, tokenizer: Tokenizer, sampling: Sampling, *, show_speed: bool = False) -> None:
        from model.generate import Past

        self.model, self.tokenizer, self.sampling, self.show_speed = model, tokenizer, sampling, show_speed
        self._answers = 0
        self._ends = ends_of(tokenizer, model.config)
        # Keys and values of the conversation so far: only new tokens are computed.
        self._past = Past(model)

    @property
    def longest_prompt(self) -> int:
        """In tokens: an answer of max_new_tokens fits behind it, but a prompt may always take half of the positions."""
        positions = self.model.config.max_position_embeddings
        return positions - min(self.sampling.max_new_tokens, positions // 2)

    def converse(self, history: list[Message], question: str) -> None:
        """Answer a question, then add both to the history, up to the point where the answer ended or was stopped.

        An unanswered question is not added. Raises: ValueError for a question that is too long for the model, or empty.
        """
        asked = [*history, Message(role="user", content=question)]
        prompt_ids, kept = fit_conversation(self.tokenizer, asked, self.longest_prompt)
        if len(kept) < len(asked):
            remark(f"the conversation outgrew the model: the oldest {len(asked) - len(kept)} messages are left out")
        said: list[str] = []
        try:
            self._say(prompt_ids, self.tokenizer.stream_decoder(), said, without_outer_spaces)
        finally:
            answer = "".join(said)
            if answer.strip():
                history[:] = [*kept, Message(role="assistant", content=answer)]
        if not answer.strip():
            remark("the model ended its answer at once")

    def complete(self, text: str) -> None:
        """Print a text and its continuation. Raises: ValueError for a text that is too long for the model."""
        prompt_ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
        decoder = self.tokenizer.stream_decoder()
        # The decoder must have seen the text: it drops a space at the beginning of everything it decodes.
        for token in prompt_ids:
            decoder.push(token)
        self._say(prompt_ids, decoder, [text], lambda pieces: pieces)

    def choose(self, question: str, system: str | None, choices: int, *, completion: bool) -> None:
        """Print several answers to a question, or continuations of a text, numbered, each when those before it are printed.

        Raises: ValueError for a question that is too long for the model, or empty.
        """
        from engine.inference.generation import Prompt, answers

        if completion:
            prompt_ids = [self.tokenizer.bos_id, *self.tokenizer.encode(question)]
        else:
            head = [] if system is None else [Message(role="system", content=system)]
            asked = [*head, Message(role="user", content=question)]
            prompt_ids, _ = fit_conversation(self.tokenizer, asked, self.longest_prompt)
        seeds = [(self.sampling.seed + number) % 2**63 for number in range(choices)]
        prompts = [Prompt(prompt_ids, replace(self.sampling, seed=seed), self._ends) for seed in seeds]
        waiting: dict[int, str] = {}
        start, tokens, printed = time.perf_counter(), 0, 0
        for answer in answers(self.model, prompts):
            tokens += len(answer.ids)
            said = self.tokenizer.decode([*prompt_ids, *answer.ids] if completion else answer.ids)
            waiting[answer.number] = said if completion else said.strip(" ")
            while printed in waiting:
                print(f"[{printed + 1}] {waiting.pop(printed)}", flush=True)
                printed += 1
        if self.show_speed:
            remark(f"{choices} answers, {tokens} tokens: {tokens / (time.perf_counter() - start):.1f} tokens/s")

    def _say(
        self,
        prompt_ids: list[int],
        decoder: StreamDecoder,
        said: list[str],
        trim: Callable[[Iterable[str]], Iterable[str]],
    ) -> None:
        """Print the pieces in `said`, then the answer; each printed piece is appended to `said` at once."""
        from model.generate import generate

        start = time.perf_counter()
        # Each answer has its own seed, because equal draws would make answers resemble one another.
        sampling = replace(self.sampling, seed=(self.sampling.seed + self._answers) % 2**63)
        tokens = generate(self.model, prompt_ids, sampling, stop_ids=self._ends, past=self._past)
        self._answers += 1
        chosen: list[int] = []
        times: list[float] = []

        def pieces() -> Iterator[str]:
            for token in tokens:
                chosen.append(token)
                times.append(time.perf_counter())
                yield decoder.push(token)
            yield decoder.finish()

        print("".join(said), end="", flush=True)
        try:
            for piece in trim(pieces()):
                print(piece, end="", flush=True)
                said.append(piece)
        finally:
            print(flush=True)
        if chosen[-1] not in self._ends:
            remark(f"cut after {len(chosen)} tokens by sampling.max_new_tokens or the model's max_position_embeddings")
        if self.show_speed:
            rate = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
            remark(f"{len(prompt_ids)} + {len(chosen)} tokens: the first after {times[0] - start:.2f} s{rate}")


def fit_conversation(tokenizer: Tokenizer, messages: Sequence[Message], longest: int) -> tuple[list[int], list[Message]]:
    """The prompt of a conversation that ends with a question, and the messages in it.

    The oldest exchanges are left out until the prompt has at most `longest` tokens; a system message stays.

    Raises: ValueError where system message and question alone are longer, or where the chat template cannot express a message.
    """
    kept = list(messages)
    first = int(kept[0]["role"] == "system")
    while len(prompt_ids := encode_prompt(tokenizer, kept)) > longest:
        if len(kept) == first + 1:
            raise ValueError(
                f"{'system message and question take' if first else 'the question takes'} {len(prompt_ids)} tokens; "
                f"the model has room for {longest} beside the answer. Shorten it, or lower sampling.max_new_tokens"
            )
        del kept[first : first + 2]
    return prompt_ids, kept


def without_outer_spaces(pieces: Iterable[str]) -> Iterator[str]:
    """A streamed answer without the chat template's spaces at both ends. Spaces are held back until text follows."""
    held, begun = "", False
    for piece in pieces:
        text = held + piece if begun else piece.lstrip(" ")
        shown = text.rstrip(" ")
        if shown:
            begun = True
            yield shown
        held = text[len(shown) :]


def run(settings: ChatSettings) -> None:
    """Answer the prompt, or else each line of standard input."""
    from engine.environment import choose_device
    from engine.inference.opening import open_model

    folder, tokenizer, model = open_model(settings.model, choose_device(settings.device), settings.dtype)
    if tokenizer.template is not None and not settings.completion:
        remark(f"the chat template is the folder's own, of {folder}")
    speaker = Speaker(model, tokenizer, settings.sampling, show_speed=settings.show_speed)
    if settings.choices > 1 and settings.prompt is not None:
        speaker.choose(settings.prompt, settings.system, settings.choices, completion=settings.completion)
        return
    conversation = Conversation(speaker, settings.system, completion=settings.completion)
    if settings.prompt is not None:
        conversation.ask(settings.prompt)
        return
    for line in questions(HISTORY if settings.history is None else settings.history):
        try:
            if not conversation.take(line):
                return
        except KeyboardInterrupt:
            remark("answer stopped")
        except ValueError as error:
            remark(f"error: {error}")


def main(argv: Sequence[str] | None = None) -> None:
    command(ChatSettings, run, with_first(argv, "model"), "python -m recipes.chat")


if __name__ == "__main__":
    main()
