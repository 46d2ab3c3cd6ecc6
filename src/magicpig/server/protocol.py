"""What clients send: OpenAI's fields, those that vLLM added, and ours under the key `magicpig`. Checked here once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from magicpig.config import Config
from magicpig.engine.request import LARGEST_SEED, MOST_CHOICES, MOST_LOGPROBS, SamplingParams
from magicpig.server.errors import ApiError

CHAT_MOST_LOGPROBS = 20  # OpenAI's limit
MOST_PROMPTS = 1024


def _is_text(text: str) -> str:
    # JSON can spell half a character; no tokenizer takes it.
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not valid Unicode: it has a lone surrogate")
    return text


Text = Annotated[str, AfterValidator(_is_text)]
Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    # Clients send fields of other servers; those that ask for what we do not do are named below and refused.
    model_config = ConfigDict(extra="ignore")


class StreamOptions(_Body):
    """include_usage: one more event with the usage, before [DONE]."""

    include_usage: bool = False


class _Sampling(_Body):
    """The fields that completions and chats share."""

    model: Text | None = Field(None, description="a name of /v1/models; may be left out")
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=0, description="default: as many as fit the model")
    min_tokens: int = Field(0, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 or -1: all tokens")
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    logit_bias: dict[str, float] | None = Field(None, description="token id: -100 to 100")
    stop: Text | list[Text] | None = None
    stop_token_ids: list[Token] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    seed: int | None = None
    priority: int = Field(0, ge=0, le=100, description="0 comes first")
    user: Text | None = None
    magicpig: dict[str, Any] | None = Field(
        None,
        description="settings of sampled attention for this request",
        json_schema_extra={"properties": Config.model_json_schema()["properties"]},
    )

    def sampling(self, **more: Any) -> SamplingParams:
        """Raises ApiError, or ArgumentError for values out of range."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options is only allowed with stream=true", param="stream_options")
        stop = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            logit_bias=_bias(self.logit_bias or {}),
            stop=tuple(text for text in stop if text),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop=self.include_stop_str_in_output,
            ignore_eos=self.ignore_eos,
            seed=None if self.seed is None else self.seed % LARGEST_SEED,
            n=1 if self.n is None else self.n,
            skip_special_tokens=self.skip_special_tokens,
            **more,
        )

    def config(self, base: Config) -> Config | None:
        """The settings of this request, or None for those of the server. Raises ApiError."""
        if not self.magicpig:
            return None
        try:
            return base.changed(self.magicpig)
        except (ValueError, TypeError) as error:
            raise ApiError(400, f"magicpig: {error}", told="invalid_argument", param="magicpig") from None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Sampling):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[Token] | list[list[Token]]
    max_tokens: int | None = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False
    best_of: int | None = Field(None, ge=1)
    suffix: Text | None = None

    def prompts(self) -> list[str | list[int]]:
        """One text or list of token ids for each prompt. Raises ApiError."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            prompt = [prompt]
        if not prompt:
            raise ApiError(400, "prompt is empty", param="prompt")
        if len(prompt) > MOST_PROMPTS:
            raise ApiError(400, f"prompt has {len(prompt)} entries; allowed are {MOST_PROMPTS}", param="prompt")
        return list(prompt)

    def params(self) -> SamplingParams:
        """Raises ApiError, or ArgumentError for values out of range."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ApiError(400, "best_of is not supported; use n", param="best_of", told="unsupported")
        if self.suffix:
            raise ApiError(400, "suffix is not supported", param="suffix", told="unsupported")
        return self.sampling(logprobs=self.logprobs, prompt_logprobs=self.logprobs if self.echo else None)


class TextPart(_Body):
    """A part of a message; others than text are refused."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """What else it has is for the chat template."""

    model_config = ConfigDict(extra="allow")

    role: Text
    content: Text | list[TextPart] | None = None

    def as_dict(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        return {**self.model_dump(exclude={"content"}), "content": content or ""}


class ResponseFormat(_Body):
    """Only type "text" is supported."""

    type: str


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=CHAT_MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def params(self) -> SamplingParams:
        """Raises ApiError, or ArgumentError for values out of range."""
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise ApiError(400, f"{name} are not supported by this server", param=name, told="unsupported")
        if self.response_format is not None and self.response_format.type != "text":
            raise ApiError(
                400,
                f"response_format {self.response_format.type!r} is not supported by this server; allowed: 'text'",
                param="response_format",
                told="unsupported",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self.sampling(logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    def conversation(self) -> list[dict[str, Any]]:
        return [message.as_dict() for message in self.messages]


class TokenizeRequest(_Body):
    """POST /tokenize, of a text or of a conversation; as vLLM's."""

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(_Body):
    """POST /detokenize; as vLLM's."""

    model: Text | None = None
    tokens: list[Token]


def _bias(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in bias.items()}
    except ValueError:
        raise ApiError(400, "logit_bias has a key that is not a token id", param="logit_bias") from None
