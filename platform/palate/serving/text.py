"""Text from tokens as they come: whole characters only, and no part of a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of an answer, without special tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


class TextStream:
    """The growing text of one answer. Each token costs the decoding of a few tokens, not of the whole answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._longest_stop = max((len(stop) for stop in self._stop), default=0)
        self._context: list[int] = []  # tokens whose text is known; a token's text may depend on the one before it
        self._pending: list[int] = []  # tokens after them, which end within a character
        self._text = ""
        self._shown = 0
        self.stopped = False

    def push(self, token_id: int) -> None:
        """Add a token; ``stopped`` tells whether a stop string is complete."""
        self._pending.append(token_id)
        known = decode(self._tokenizer, self._context)
        new = decode(self._tokenizer, self._context + self._pending)[len(known) :]
        text = self._text + new.rstrip(_INCOMPLETE)
        # Only a match that the new text takes part in is new.
        start = max(0, len(self._text) - self._longest_stop + 1)
        matches = [at for at in (text.find(stop, start) for stop in self._stop) if at >= 0]
        if matches:
            self._text, self.stopped = text[: min(matches)], True
        elif not new.endswith(_INCOMPLETE):
            self._text += new
            if new:  # a special token has no text: what follows hangs on the word before it
                self._context = self._pending
            self._pending = []

    def take(self) -> str:
        """What can be shown now and was not before: the end stays back while it may begin a stop string."""
        end = len(self._text)
        if not self.stopped:
            end -= max((_overlap(self._text, stop) for stop in self._stop), default=0)
        shown, self._shown = self._shown, max(self._shown, end)
        return self._text[shown : self._shown]

    def finish(self, token_ids: Sequence[int]) -> tuple[str, str]:
        """The whole answer of ``token_ids``, and the part of it that was not taken yet."""
        text = self._text if self.stopped else decode(self._tokenizer, token_ids)
        return text, text[self._shown :]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is the beginning of ``stop``."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
