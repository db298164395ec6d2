"""Generation: what a model says after a prompt, or in a chat."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tokenizers import Tokenizer

from bitwright.checkpoint.hub import finds_models
from bitwright.errors import CalibrationError
from bitwright.files.home import expands_home
from bitwright.generation.sampling import Sampler
from bitwright.generation.session import ContextError, Session
from bitwright.generation.stops import stop_tokens
from bitwright.generation.stream import TextStream
from bitwright.loading.model import Model, load_model
from bitwright.process.memory import peak_memory_bytes
from bitwright.text.chat import ChatTemplate
from bitwright.text.samples import load_tokenizer


@dataclass(frozen=True)
class Generation:
    """What a model has said.

    Parameters
    ----------
    text
        Without the prompt and special tokens.
    tokens
        Their ids, the one that ended the text left out.
    prompt_tokens
        How many tokens the prompt has.
    ended
        Whether the model ended the text itself.
    prompt_seconds, seconds
        Wall time of reading the prompt, and of what came after it.
    peak_memory_bytes
        Largest resident memory of the process so far.
    """

    DERIVED: ClassVar = ("tokens_per_second",)

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    ended: bool
    prompt_seconds: float
    seconds: float
    peak_memory_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second after the prompt has been read; 0 where there are none."""
        return len(self.tokens) / self.seconds if self.tokens and self.seconds else 0.0


class Writer:
    """A model in memory with its tokenizer.

    Parameters
    ----------
    model
        Checkpoint folder, GGUF file, name at the hub, or a loaded model.
    """

    def __init__(self, model: str | os.PathLike[str] | Model) -> None:
        self.model = model if isinstance(model, Model) else load_model(model)
        self.folder = self.model.checkpoint.folder
        self.tokenizer: Tokenizer = load_tokenizer(self.folder)
        self.stops = stop_tokens(self.model, self.tokenizer)
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        """The weights and the cache, read when they are first needed."""
        self._session = self._session or Session(self.model)
        return self._session

    def encode(self, text: str, special: bool) -> list[int]:
        """Return the tokens of a prompt, with those that the tokenizer puts first if `special`."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=special).ids
        while special and ids and ids[-1] in self.stops and len(ids) > 1:
            ids.pop()  # which the tokenizer has put behind the text
        if not ids:
            raise CalibrationError("prompt: has no tokens; write what the model is to go on from")
        vocabulary = self.model.config.vocab_size
        if max(ids) >= vocabulary:
            raise CalibrationError(
                f"{self.folder}: the tokenizer gives token {max(ids)}, but the model knows {vocabulary}; "
                f"copy the tokenizer.json of this model there"
            )
        return ids

    def write(
        self,
        ids: Sequence[int],
        sampler: Sampler,
        max_tokens: int,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Go on from tokens; see `generate`."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected 1 or more, got {max_tokens}")
        session, limit = self.session, self.session.limit
        if len(ids) >= limit:
            raise ContextError(
                f"{self.folder}: the prompt has {len(ids)} tokens, but the model knows {limit} positions; "
                f"shorten it to at most {limit - 1}"
            )
        begun = time.perf_counter()
        logits = session.goes_on_to(ids)
        read = time.perf_counter()
        stream, said, ended = TextStream(self.tokenizer, ids), list[int](), False
        pieces: list[str] = []

        def tell(text: str) -> None:
            pieces.append(text)
            if text and on_text is not None:
                on_text(text)

        while True:
            token = sampler.choose(logits)
            ended = token in self.stops
            if ended:
                break
            said.append(token)
            tell(stream.push(token))
            if len(said) == max_tokens or len(ids) + len(said) == limit:
                break
            logits = session.next_logits([token])
        tell(stream.rest())
        return Generation(
            text="".join(pieces),
            tokens=tuple(said),
            prompt_tokens=len(ids),
            ended=ended,
            prompt_seconds=read - begun,
            seconds=time.perf_counter() - read,
            peak_memory_bytes=peak_memory_bytes(),
        )


@expands_home
@finds_models
def generate(
    model: str | os.PathLike[str] | Model,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    bos: bool = True,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Let a model go on from a prompt.

    Weights stay in memory as they are stored: products are computed from the codes.

    Parameters
    ----------
    model
        Checkpoint folder or GGUF file, in float or quantized, or a loaded model.
    prompt
        Text.
    max_tokens
        Stop after so many, unless the model ends the text before.
    temperature, top_k, top_p, seed
        How each token is chosen: the likeliest at temperature 0; otherwise by chance among the `top_k`
        likeliest (0: all), and of them the fewest whose probabilities add up to `top_p`.
    bos
        Begin with what the tokenizer puts first.
    on_text
        Called with pieces of the text as they come, whole characters only.

    Returns
    -------
    Generation

    Raises
    ------
    CheckpointError, CalibrationError, NonFiniteError
        If the model or its tokenizer cannot be used; the message says why.
    ValueError
        If a number is out of its range, or the prompt longer than the model knows positions.

    Examples
    --------
    >>> import bitwright
    >>> said = bitwright.generate(bitwright.demo_folder(), "Once upon a time", max_tokens=8)
    >>> len(said.tokens)
    8
    """
    sampler = Sampler(temperature, top_k, top_p, seed)
    writer = Writer(model)
    return writer.write(writer.encode(prompt, bos), sampler, max_tokens, on_text)


class Chat:
    """A chat with a model, by the template that comes with its tokenizer.

    Parameters
    ----------
    model
        Checkpoint folder or GGUF file, in float or quantized, or a loaded model.
    system
        What the model is told first.
    temperature, top_k, top_p, seed
        As for `generate`.

    Raises
    ------
    CheckpointError, CalibrationError
        If the model cannot be used, or has no chat template.
    ValueError
        If a number is out of its range.

    Examples
    --------
    >>> import bitwright
    >>> bitwright.Chat(bitwright.demo_folder())  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    bitwright.errors.CalibrationError: ...there is no chat template...
    """

    @expands_home
    @finds_models
    def __init__(
        self,
        model: str | os.PathLike[str] | Model,
        system: str | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self._sampler = Sampler(temperature, top_k, top_p, seed)
        self._writer = Writer(model)
        self._where = f"{self._writer.folder}: a conversation"
        self._template = ChatTemplate(self._writer.folder, self._where)
        self.messages: list[dict[str, Any]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def say(
        self, text: str, max_tokens: int = 512, on_text: Callable[[str], None] | None = None
    ) -> Generation:
        """Say something; return the model's answer.

        Parameters
        ----------
        text
            What to say. It is remembered with the answer; what fails is forgotten.
        max_tokens, on_text
            As for `generate`.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        written = self._template.render({"messages": asked}, self._where, prompts=True)
        ids = self._writer.encode(written, special=False)
        answer = self._writer.write(ids, self._sampler, max_tokens, on_text)
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return answer
