"""Requests and answers in OpenAI's shapes, and what of them is implemented.

Every field that OpenAI documents is implemented or refused with an error that names it; none is ignored. A field that
is null counts as absent, and one that asks for nothing (a penalty of 0) is accepted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator

from palate.users.checks import MOST_TEXTS

# Fields that are not implemented, with the values that ask for nothing.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}

MAX_SEED = 2**63 - 1


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no character") from error
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


Text = Annotated[StrictStr, AfterValidator(_encodable)]
StopText = Annotated[Text, Field(max_length=1000)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Unsupported(ValueError):
    """A field of OpenAI's that is not implemented; ``param`` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class _Body(BaseModel):
    """A request body: null is absent, and what is not declared must ask for nothing."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return (
            {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values
        )

    def require_supported(self) -> None:
        """Refuse fields that ask for what is not implemented.

        Raises:
            Unsupported: naming the first.
        """
        for name, value in (self.model_extra or {}).items():
            if name not in NEUTRAL:
                raise Unsupported(name, f"{name!r} is not supported by this server: leave it out")
            if not any(type(value) is type(neutral) and value == neutral for neutral in NEUTRAL[name]) and not (
                isinstance(value, int | float) and not isinstance(value, bool) and value in NEUTRAL[name]
            ):
                raise Unsupported(name, f"{name!r} is not supported by this server: leave it out")


class _Part(BaseModel):
    """A part of a message's content; ``type`` says what it is."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr
    text: Text | None = None
    image_url: Any = None

    def check(self, where: str) -> None:
        """Refuse a part that is neither a text nor an image's URL; ``where`` names it.

        Raises:
            Unsupported: naming what is wrong with it.
        """
        if self.type not in ("text", "image_url"):
            raise Unsupported(
                f"{where}.type", f"only parts of type 'text' and 'image_url' are supported, found {self.type[:100]!r}"
            )
        for name, value in {"text": self.text, "image_url": self.image_url, **(self.model_extra or {})}.items():
            if name != self.type and value is not None:
                raise Unsupported(f"{where}.{name}", f"{name!r} in a part of type {self.type!r} is not supported")
        if self.type == "image_url":
            self._check_image(f"{where}.image_url")
        elif self.text is None:
            raise Unsupported(f"{where}.text", "a part of type 'text' needs a text")

    def _check_image(self, where: str) -> None:
        given = self.image_url
        if not isinstance(given, dict) or not isinstance(given.get("url"), str):
            raise Unsupported(f"{where}.url", "an image is sent as {'url': 'data:image/png;base64,...'}")
        if given.get("detail") not in (None, "auto"):
            raise Unsupported(
                f"{where}.detail", "only 'detail' 'auto' is supported: each image has the model's one resolution"
            )
        for name in given.keys() - {"url", "detail"}:
            raise Unsupported(where, f"{name[:100]!r} of an image is not supported: leave it out")


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="allow")
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[_Part]

    def text(self, place: int) -> str:
        """The content's texts as one.

        Raises:
            Unsupported: it has a part that is neither a text nor an image, or the message has further fields.
        """
        for name, value in (self.model_extra or {}).items():
            if value is not None and not (name in ("tool_calls", "annotations") and value == []):
                raise Unsupported(f"messages.{place}.{name}", f"{name!r} in messages is not supported: leave it out")
        if isinstance(self.content, str):
            return self.content
        for number, part in enumerate(self.content):
            part.check(f"messages.{place}.content.{number}")
        return "\n".join(part.text or "" for part in self.content if part.type == "text")

    def images(self, place: int) -> list["SentImage"]:
        """The images among the parts, which ``text`` has checked.

        Raises:
            Unsupported: the message is not a user's.
        """
        if isinstance(self.content, str):
            return []
        places = [number for number, part in enumerate(self.content) if part.type == "image_url"]
        if places and self.role != "user":
            where = f"messages.{place}.content.{places[0]}.type"
            raise Unsupported(where, f"only a user's messages have images, found one in the {self.role}'s")
        return [SentImage(f"messages.{place}.content.{n}", self.content[n].image_url["url"]) for n in places]


@dataclass(frozen=True)
class SentImage:
    """An image of a message: the name of its part, and its URL."""

    where: str
    url: str


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False
    include_obfuscation: Literal[False] = False


class ResponseFormat(BaseModel):
    """Only plain text is implemented."""

    model_config = ConfigDict(extra="allow")
    type: StrictStr


class Personalization(BaseModel):
    """Palate's own field: how strongly the person's vector corrects the cluster's model, or neither of them."""

    model_config = ConfigDict(extra="forbid")
    beta: Annotated[Number, Field(ge=0, le=10)] | None = None
    base: StrictBool = False
    """Answer as the base model does: no adapter, no vector, no quoted history."""

    @model_validator(mode="after")
    def _one_of_them(self) -> "Personalization":
        if self.base and self.beta:
            raise ValueError("'base' asks for no correction, and 'beta' for one: leave one of them out")
        return self


class _Sampled(_Body):
    """What both kinds of completions share."""

    model: StrictStr
    user: StrictStr | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    n: Annotated[StrictInt, Field(ge=1)] = 1
    seed: Annotated[StrictInt, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] = Field(default_factory=list)
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    personalization: Personalization = Field(default_factory=Personalization)

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def require_supported(self) -> None:
        super().require_supported()
        if "" in self.stops:
            raise Unsupported("stop", "a stop string is empty: leave it out")
        if self.stream_options is not None and not self.stream:
            raise Unsupported("stream_options", "'stream_options' is for streams: set 'stream' to true or leave it out")


class ChatRequest(_Sampled):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def turns(self) -> list[tuple[str, str]]:
        """(role, text) of every message; ``developer`` is another name for ``system``."""
        return [
            ("system" if message.role == "developer" else message.role, message.text(place))
            for place, message in enumerate(self.messages)
        ]

    def images(self) -> list[SentImage]:
        """The images of all messages, in order; ``turns`` has checked them."""
        return [image for place, message in enumerate(self.messages) for image in message.images(place)]

    def require_supported(self) -> None:
        super().require_supported()
        if self.response_format is not None and (
            self.response_format.type != "text" or self.response_format.model_extra
        ):
            raise Unsupported("response_format", "only the response_format {'type': 'text'} is supported")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Unsupported("max_tokens", "'max_tokens' is the old name of 'max_completion_tokens': give one of them")
        if self.top_logprobs is not None and not self.logprobs:
            raise Unsupported("top_logprobs", "'top_logprobs' needs 'logprobs' set to true")

    @property
    def length_field(self) -> str:
        """Which field says how long the answer may be."""
        return "max_tokens" if self.max_tokens is not None else "max_completion_tokens"

    @property
    def characters(self) -> int:
        """Length of all texts together."""
        return sum(len(text) for _, text in self.turns())


class CompletionRequest(_Sampled):
    """``POST /v1/completions``."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = 16  # OpenAI's default
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None

    length_field: ClassVar[str] = "max_tokens"

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def characters(self) -> int:
        """Length of the longest prompt."""
        return max(map(len, self.prompts))

    def require_supported(self) -> None:
        super().require_supported()
        if "" in self.prompts:
            raise Unsupported("prompt", "a prompt is empty: there is nothing to continue")


class PastTextBody(BaseModel):
    """A text that a person wrote: what it answers, and the text."""

    model_config = ConfigDict(extra="forbid")
    input: Annotated[Text, Field(max_length=100_000)] = ""
    output: Annotated[Text, Field(min_length=1, max_length=100_000)]
    date: Annotated[Text, Field(max_length=40)] | None = None


class HistoryRequest(BaseModel):
    """``PUT /v1/users/{id}``: the person's texts, oldest first."""

    model_config = ConfigDict(extra="forbid")
    texts: Annotated[list[PastTextBody], Field(min_length=1, max_length=MOST_TEXTS)]


class FeedbackRequest(BaseModel):
    """``POST /v1/feedback``: what a person made of an answer."""

    model_config = ConfigDict(extra="forbid")
    user: StrictStr
    prompt: Annotated[Text, Field(max_length=100_000)]
    answer: Annotated[Text, Field(max_length=100_000)] = ""
    edited: Annotated[Text, Field(min_length=1, max_length=100_000)]
