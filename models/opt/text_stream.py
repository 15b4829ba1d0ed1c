"""Turning a stream of token ids into pieces of text."""

from collections.abc import Iterable, Iterator
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes one row's tokens as they come, never in the middle of a character.

    A byte-level token may end inside a UTF-8 sequence, which decodes to a replacement
    character at the end of the text. Such tokens are held back until the text ends in
    another character, so all pieces joined equal the text of all tokens at once.

    Args:
        tokenizer: a `tokenizers.Tokenizer`, or anything else with
            ``decode(ids, skip_special_tokens=...)``.
        prompt_ids: tokens before the first one, whose text is not repeated. They matter
            for tokenizers that drop the space before the first word of a text.
        skip_special_tokens: whether end-of-text and padding tokens leave no text.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_ids: Iterable[int] = (),
        *,
        skip_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        # _ids[:_shown] is text already given out; it stays as context for the rest.
        self._ids = [int(i) for i in prompt_ids]
        self._shown = len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(int(token_id))
        return self._take(final=False)

    def finish(self) -> str:
        """The text still held back: bytes that no token completed to a character."""
        return self._take(final=True)

    def _take(self, final: bool) -> str:
        held = len(self._ids) - self._shown
        if not held:
            return ""
        context = self._decode(self._ids[: self._shown])
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) and not final:
            return ""
        piece = text[len(context) :]
        # Only the last stretch is needed as context: the cost stays constant. But it
        # must have text, or the next word would lose its space.
        if piece:
            self._ids = self._ids[self._shown :]
            self._shown = held
        elif context:
            del self._ids[self._shown :]
        else:
            self._shown = len(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=self._skip_special_tokens
        )


def stream_text(
    tokens: Iterable[int],
    tokenizer: Any,
    prompt_ids: Iterable[int] = (),
    *,
    skip_special_tokens: bool = True,
) -> Iterator[str]:
    """Yields the non-empty pieces of text of one row's tokens; see `TextStream`."""
    stream = TextStream(tokenizer, prompt_ids, skip_special_tokens=skip_special_tokens)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if piece := stream.finish():
        yield piece
