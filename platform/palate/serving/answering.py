"""The n answers to one request as they come, and how they look in OpenAI's shapes."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from transformers import PreTrainedTokenizerBase

from palate.serving.engine import Completion, Event, Request
from palate.serving.text import decode
from palate.serving.worker import EngineWorker

Indexed = tuple[int, Event]


class NotFinite(Exception):
    """The model's numbers for this request are not finite, and would not be if it was sent again."""


class Answering:
    """Runs the requests together. ``close`` stops what still runs; whoever makes one must close it."""

    def __init__(self, worker: EngineWorker, requests: Sequence[Request]) -> None:
        worker.require_room(len(requests))
        self._arrived: asyncio.Queue[Indexed | BaseException] = asyncio.Queue()
        self._left = len(requests)
        self._tasks = [asyncio.create_task(self._run(worker, index, request)) for index, request in enumerate(requests)]

    async def next(self) -> Indexed | None:
        """The next token of any of them; None when all are complete.

        Raises:
            Overloaded, EngineFailed, ValueError: as the worker's ``stream``.
            NotFinite: the model gave NaN or infinite values.
        """
        if not self._left:
            return None
        item = await self._arrived.get()
        if isinstance(item, BaseException):
            raise item
        completion = item[1].completion
        if completion is not None:
            self._left -= 1
            if completion.finish_reason == "error":
                raise NotFinite("the model gave NaN or infinite values for this request")
        return item

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, worker: EngineWorker, index: int, request: Request) -> None:
        try:
            async with aclosing(worker.stream(request)) as events:
                async for event in events:
                    self._arrived.put_nowait((index, event))
        except Exception as error:
            self._arrived.put_nowait(error)


def envelope(kind: str, model: str) -> dict[str, Any]:
    """What every answer and every chunk of it begins with; ``kind`` is "chat.completion" or "text_completion"."""
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompt_tokens: int, completions: Sequence[Completion]) -> dict[str, int]:
    """Tokens read and chosen, the end tokens too."""
    chosen = sum(len(completion.token_ids) for completion in completions)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": chosen, "total_tokens": prompt_tokens + chosen}


def chat_log_probs(tokenizer: PreTrainedTokenizerBase, events: Sequence[Event]) -> dict[str, Any]:
    """``logprobs`` of a chat answer, or of a chunk of it."""
    return {
        "content": [
            {
                **_token(tokenizer, event.token_id, event.log_prob),
                "top_logprobs": [_token(tokenizer, token, log_prob) for token, log_prob in event.top],
            }
            for event in events
        ],
        "refusal": None,
    }


def text_log_probs(tokenizer: PreTrainedTokenizerBase, events: Sequence[Event], offset: int = 0) -> dict[str, Any]:
    """``logprobs`` of a plain completion; ``offset`` is the length of the tokens' texts before.

    The chosen token is among the top ones, as OpenAI has it. Of tokens that look alike the likeliest counts.
    """
    tokens = [decode(tokenizer, [event.token_id]) for event in events]
    offsets = [offset + sum(map(len, tokens[:place])) for place in range(len(tokens))]
    tops = []
    for text, event in zip(tokens, events, strict=True):
        top = {decode(tokenizer, [token]): log_prob for token, log_prob in reversed(event.top)}
        top.setdefault(text, event.log_prob)
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": [event.log_prob for event in events],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _token(tokenizer: PreTrainedTokenizerBase, token: int, log_prob: float) -> dict[str, Any]:
    text = str(tokenizer.decode([token]))
    # A part of a character has no text of its own, and its bytes are not what the replacement sign's are.
    return {"token": text, "logprob": log_prob, "bytes": None if "\ufffd" in text else list(text.encode())}
