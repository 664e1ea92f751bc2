"""Talk to a model: a conversation, one question (--prompt), or the continuation of a text (--completion).

    python -m recipes.chat --model runs/dpo
    python -m recipes.chat --model exports/shisa-7b --system "You are a helpful assistant." --prompt "日本の首都は？"
    python -m recipes.chat --model mistralai/Mistral-7B-v0.1 --completion --prompt "Once upon a time"

Answers go to standard output as they are made, remarks to standard error. A conversation reads a question a line; the end of
input (Ctrl-D) ends it, Ctrl-C ends an answer or, at the question, the conversation.
"""

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from engine.checkpoint.state import model_folder
from engine.environment import choose_device
from model.generate import Past, Sampling, generate
from model.mistral import Mistral
from model.vocabulary.chat import Message, encode_prompt
from model.vocabulary.tokenizer import StreamDecoder, Tokenizer
from model.weights import load_model
from recipes.command import command

with contextlib.suppress(ImportError):
    # Its import alone gives input() line editing that knows how wide Japanese characters are, and a history.
    import readline  # noqa: F401


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """Conversation with a model."""

    model: str
    """Run folder (its newest checkpoint is taken), checkpoint, Hugging Face folder, or hub repository owner/name."""
    system: str | None = None
    """System message, which stands before the first question."""
    prompt: str | None = None
    """Answer this alone, then end."""
    completion: bool = False
    """Continue plain text, without the chat template: for base models."""
    show_speed: bool = False
    """Print tokens per second after each answer."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA if there is a GPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the parameters; auto: bfloat16 on CUDA, float32 on the CPU."""
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7))
    """How the next token is chosen."""

    def __post_init__(self) -> None:
        if self.completion and self.system is not None:
            raise ValueError("system has no effect with completion, which continues plain text; leave one of them out")


class Speaker:
    """A model with its tokenizer that answers on standard output."""

    def __init__(self, model: Mistral, tokenizer: Tokenizer, sampling: Sampling, *, show_speed: bool = False) -> None:
        pieces, rows = tokenizer.vocab_size, model.config.unpadded_vocab_size
        if pieces > rows:
            raise ValueError(f"the tokenizer has {pieces} pieces, the model only {rows}: they do not belong together")
        # Folders of other software do not say how many of their rows are padding; the tokenizer does.
        model.config = replace(model.config, unpadded_vocab_size=pieces)
        self.model, self.tokenizer, self.sampling, self.show_speed = model, tokenizer, sampling, show_speed
        # Leaves room for an answer of max_new_tokens, but is never less than half of the positions.
        positions = model.config.max_position_embeddings
        self.longest_prompt = positions - min(sampling.max_new_tokens, positions // 2)
        self._answers = 0
        # Of a conversation only what is new is read.
        self._past = Past(model)

    def converse(self, history: list[Message], question: str) -> None:
        """Answer a question and add both to the history, as far as the answer got; a question without answer is not added.

        Raises: ValueError for a question that cannot be asked, such as one that is too long for the model.
        """
        asked = [*history, Message(role="user", content=question)]
        prompt_ids, kept = fit_conversation(self.tokenizer, asked, self.longest_prompt)
        if len(kept) < len(asked):
            remark(f"the conversation outgrew the model: the oldest {len(asked) - len(kept)} messages are forgotten")
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
        """Print a text and what the model continues it with.

        Raises: ValueError for a text that is too long for the model.
        """
        prompt_ids = [self.tokenizer.bos_id, *self.tokenizer.encode(text)]
        decoder = self.tokenizer.stream_decoder()
        # The decoder has to know what comes before: a space at the beginning of all text would be dropped.
        for token in prompt_ids:
            decoder.push(token)
        self._say(prompt_ids, decoder, [text], lambda pieces: pieces)

    def _say(
        self,
        prompt_ids: list[int],
        decoder: StreamDecoder,
        said: list[str],
        trim: Callable[[Iterable[str]], Iterable[str]],
    ) -> None:
        """Print what `said` holds and the answer; each piece is added to `said` as soon as it is printed."""
        start = time.perf_counter()
        # Another seed for each answer: the same draws would make a second answer resemble the first.
        sampling = replace(self.sampling, seed=(self.sampling.seed + self._answers) % 2**63)
        tokens = generate(self.model, prompt_ids, sampling, stop_ids=(self.tokenizer.eos_id,), past=self._past)
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
        if chosen[-1] != self.tokenizer.eos_id:
            remark(f"cut after {len(chosen)} tokens, by sampling.max_new_tokens or the model's max_position_embeddings")
        if self.show_speed:
            rate = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
            remark(f"{len(prompt_ids)} + {len(chosen)} tokens: the first after {times[0] - start:.2f} s{rate}")


def fit_conversation(tokenizer: Tokenizer, messages: Sequence[Message], longest: int) -> tuple[list[int], list[Message]]:
    """The prompt of a conversation that ends with a question, and the messages that are in it.

    The oldest exchanges are left out until the prompt has at most `longest` tokens; a system message stays.

    Raises: ValueError when the system message and the question alone are longer, and for what the template cannot express.
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
    """A streamed answer without the spaces that the chat template puts before and after it; held back until text follows."""
    held, begun = "", False
    for piece in pieces:
        text = held + piece if begun else piece.lstrip(" ")
        shown = text.rstrip(" ")
        if shown:
            begun = True
            yield shown
        held = text[len(shown) :]


def questions() -> Iterator[str]:
    """Lines of standard input that are not blank, until its end or Ctrl-C."""
    asks = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if asks else "")
        except (EOFError, KeyboardInterrupt):
            if asks:
                print()
            return
        if line.strip():
            yield line


def remark(text: str) -> None:
    """Say something that is not the model's answer."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def run(settings: ChatSettings) -> None:
    """Answer the prompt, or each line of standard input."""
    device = choose_device(settings.device)
    folder = model_folder(settings.model)
    tokenizer = Tokenizer.load(folder)
    name = settings.dtype if settings.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    model = load_model(folder, dtype=getattr(torch, name), device=device)
    speaker = Speaker(model, tokenizer, settings.sampling, show_speed=settings.show_speed)
    history = [] if settings.system is None else [Message(role="system", content=settings.system)]
    speak = speaker.complete if settings.completion else functools.partial(speaker.converse, history)
    if settings.prompt is not None:
        speak(settings.prompt)
        return
    for line in questions():
        try:
            speak(line)
        except KeyboardInterrupt:
            remark("answer stopped")
        except ValueError as error:
            remark(f"error: {error}")


def main(argv: Sequence[str] | None = None) -> None:
    command(ChatSettings, run, argv, "python -m recipes.chat")


if __name__ == "__main__":
    main()
