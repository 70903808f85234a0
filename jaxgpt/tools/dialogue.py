"""A dialogue with a model: what was said, and a cache that holds what the model has read of it."""

import functools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.errors import ArgumentError
from jaxgpt.model import GPT, Cache
from jaxgpt.sampling import PROMPT_PIECES, Rule, capacity_for, sample
from jaxgpt.text.chat import ChatEncoder, Messages


@functools.lru_cache(maxsize=8)
def _programs(structure: Any) -> tuple[Callable, Callable]:
    """The compiled functions for all models of a structure, which `jax.tree.flatten` returns.

    They take a model as the list of its arrays: to flatten it for each token would take milliseconds. The keys and
    values are donated, so that a token changes them in place.
    """

    @functools.partial(jax.jit, donate_argnames="layers")
    def read(arrays, tokens, layers, start):
        """The keys and values with those of (1, T) tokens from position `start` on."""
        _, cache = jax.tree.unflatten(structure, arrays).hidden(tokens, Cache(layers, start))
        return cache.layers

    @functools.partial(jax.jit, donate_argnames="layers")
    def write(arrays, token, layers, start, rule, key, number):
        """The token, (1,), after one at position `start`, and the keys and values. Without a key, the likeliest."""
        model = jax.tree.unflatten(structure, arrays)
        x, cache = model.hidden(token[:, None], Cache(layers, start))
        logits = model.logits(x)[:, 0]
        if key is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache.layers
        noise = jax.random.gumbel(jax.random.fold_in(key, number), logits.shape)
        return sample(logits, noise, rule), cache.layers

    return read, write


class Writer:
    """A model that continues texts, and keeps the keys and values of one for the next text that begins like it."""

    def __init__(self, model: GPT):
        """Take a model.

        Args:
            model: the GPT, in the dtype in which it computes.
        """
        self._arrays, structure = jax.tree.flatten(model)
        self._read, self._write = _programs(structure)
        self._config = model.config
        self._dtype = model.dtype or model.token_embedding_table.embedding.dtype
        self._layers, self._capacity = None, 0
        self.tokens: list[int] = []
        """The ids whose keys and values are in the cache."""
        self.prefilled = 0
        """Tokens of the last prompt that had to be computed."""

    def write(
        self,
        prompt: Sequence[int] | np.ndarray,
        max_new_tokens: int,
        rule: Rule,
        key: jax.Array | None,
        stop: Container[int] = (),
    ) -> Iterator[list[int]]:
        """Continue a prompt. A caller may end between any two pieces.

        Args:
            prompt: (N,) ids, N from 1 to block_size - max_new_tokens.
            max_new_tokens: 1 or more.
            rule: how to choose a token.
            key: typed PRNG key; new token i is drawn with fold_in(key, i), as by `sampling.generate`. None takes the
                likeliest token, whatever the rule.
            stop: ids that end the text; they are not returned.

        Yields:
            An empty list for each part of the prompt that was computed, then a list of each new id.
        """
        prompt = np.asarray(prompt).tolist()
        self._make_room(len(prompt) + max_new_tokens)
        for _ in self._prefill(prompt[:-1]):
            yield []
        token = self._next(np.array(prompt[-1:], np.int32), rule, key, 0)
        self.tokens.append(prompt[-1])
        for i in range(1, max_new_tokens + 1):
            # the next token is being computed while this one is read and shown
            after = self._next(token, rule, key, i) if i < max_new_tokens else None
            new = int(np.asarray(token)[0])
            if after is not None:
                self.tokens.append(new)
            if new in stop:
                return
            yield [new]
            token = after

    def _make_room(self, n: int) -> None:
        """Let the cache have room for n tokens; a window of 131,072 is not allocated for a short dialogue."""
        capacity = capacity_for(n, self._config.block_size)
        if self._layers is None:
            self.tokens, self._capacity = [], capacity
            shape = self._config.kv_heads, capacity, self._config.channels_per_head
            pairs = [[jnp.zeros(shape, self._dtype) for _ in range(2)] for _ in range(self._config.n_layer)]
            self._layers = tuple(map(tuple, pairs))
        elif capacity > self._capacity:
            padding = (0, 0), (0, capacity - self._capacity), (0, 0)
            self._layers = jax.tree.map(lambda a: jnp.pad(a, padding), self._layers)
            self._capacity = capacity

    def _prefill(self, ids: list[int]) -> Iterator[None]:
        """Read a text, from the first id on that differs from what the cache holds."""
        same = 0
        while same < min(len(ids), len(self.tokens)) and ids[same] == self.tokens[same]:
            same += 1
        del self.tokens[same:]  # what lies behind in the cache is not attended to, and overwritten
        self.prefilled = len(ids) - same + 1  # the last token of the prompt is computed with the first new one
        while len(self.tokens) < len(ids):
            left = len(ids) - len(self.tokens)
            T = min(next((size for size in PROMPT_PIECES if size <= left), PROMPT_PIECES[-1]), self._capacity)
            # a piece that would end outside the cache begins earlier, with tokens that are there already
            start = min(len(self.tokens), self._capacity - T)
            piece = np.zeros((1, T), np.int32)
            piece[0, : len(ids) - start] = ids[start : start + T]
            layers, self._layers = self._layers, None  # an interrupted call leaves none
            self._layers = self._read(self._arrays, piece, layers, np.int32(start))
            self.tokens = ids[: start + T]
            yield

    def _next(self, token, rule: Rule, key: jax.Array | None, number: int) -> jax.Array:
        layers, self._layers = self._layers, None
        place, number = np.int32(len(self.tokens)), np.int32(number)
        token, self._layers = self._write(self._arrays, token, layers, place, rule, key, number)
        return token


class Dialogue:
    """What a user and a model say to each other, in turns of a question and an answer."""

    def __init__(
        self,
        writer: Writer,
        encoder: ChatEncoder,
        *,
        window: int,
        max_new_tokens: int,
        rule: Rule,
        seed: int,
        system: str | None = None,
    ):
        """Begin a dialogue.

        Args:
            writer: writes the answers.
            encoder: of the run.
            window: tokens of a prompt and its answer, the model's block_size.
            max_new_tokens: of an answer.
            rule: how to choose a token; at temperature 0 nothing is random.
            seed: of the random numbers.
            system: what the model is told before the dialogue; None = what the template says, if anything.

        Raises:
            TemplateError: the template cannot be rendered.
        """
        self._writer, self._encoder, self._rule = writer, encoder, rule
        self._window, self._max_new_tokens = window, max_new_tokens
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._key = jax.random.key(seed) if rule.temperature > 0 else None
        self._stop = encoder.ends()
        self._turns: list[Messages] = []
        self._answers = 0  # given so far, each with random numbers of its own
        self.forgotten = 0
        """Turns at the beginning that did not fit into the window any more."""

    @property
    def messages(self) -> Messages:
        """All that was said, the forgotten turns too."""
        return [*self._system, *(message for turn in self._turns for message in turn)]

    def reset(self) -> None:
        """Forget all turns."""
        self._turns, self.forgotten = [], 0

    def answer(self, message: str) -> Iterator[str]:
        """Answer a message.

        Args:
            message: of the user.

        Yields:
            The answer in pieces, some of them empty. A caller may end between any two; the answer is what it was given.

        Raises:
            TemplateError: the template refuses the dialogue.
            ArgumentError: the message by itself does not fit into the window.
        """
        turn = [{"role": "user", "content": message}]
        self._turns.append(turn)
        try:
            prompt = self._prompt()
        except BaseException:
            self._turns.pop()
            raise
        room = min(self._max_new_tokens, self._window - len(prompt))
        key = None if self._key is None else jax.random.fold_in(self._key, self._answers)
        self._answers += 1
        ids, said = self._writer.write(prompt, room, self._rule, key, self._stop), ""
        try:
            for text in self._encoder.tokenizer.decode_stream(ids, skip_special_tokens=True):
                said += text
                yield text
        finally:
            turn.append({"role": "assistant", "content": said})

    def _prompt(self) -> np.ndarray:
        """The ids of the dialogue, without the oldest turns that leave no room for the answer."""
        longest = self._window - min(self._max_new_tokens, self._window // 2)
        while True:
            turns = self._turns[self.forgotten :]
            prompt = self._encoder.encode([*self._system, *(message for turn in turns for message in turn)])
            if len(prompt) <= longest or len(turns) == 1:
                break
            self.forgotten += 1
        if len(prompt) >= self._window:
            fits = f"{len(prompt):,} tokens, with the system message"
            raise ArgumentError(f"the message does not fit ({fits}): use fewer than block_size {self._window:,}")
        return prompt
