"""What clients send: OpenAI's fields, those that vLLM added, and ours under the key `magicpig`. Checked here once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from magicpig.config import Config
from magicpig.engine.grammar import ANY_OBJECT
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
    """include_usage: one more event with the usage, before [DONE].

    include_attention: ours; with each token comes an event that says under `magicpig` what attention read for it.
    """

    include_usage: bool = False
    include_attention: bool = False


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
    def include_attention(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_attention

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


class JsonSchema(_Body):
    """Of `response_format`."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    name: Text = ""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(_Body):
    """json_object: any JSON object; json_schema: one that follows the schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(_Body):
    """What a model may call. parameters: a JSON schema."""

    name: str = Field(pattern=r"^[\w-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Body):
    """Only functions."""

    type: Literal["function"]
    function: Function


class FunctionName(_Body):
    """Of `tool_choice`."""

    name: Text


class ToolChoice(_Body):
    """The one function to call."""

    type: Literal["function"]
    function: FunctionName


class ChatRequest(_Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=CHAT_MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    functions: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def params(self) -> SamplingParams:
        """Raises ApiError, or ArgumentError for values out of range."""
        if self.functions:
            raise ApiError(400, "functions are not supported by this server; use tools", param="functions")
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self.sampling(logprobs=logprobs, json_schema=self._schema())

    @property
    def calls(self) -> bool:
        """Whether the answer may be a call of a function."""
        return bool(self.tools) and self.tool_choice != "none"

    def told_tools(self) -> list[dict[str, Any]] | None:
        """What the chat template is told."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()] if self.calls else None

    def _schema(self) -> dict[str, Any] | None:
        """What the answer has to follow. Raises ApiError."""
        chosen = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, ToolChoice):
            chosen = [function for function in chosen if function.name == self.tool_choice.function.name]
        if self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice):
            if not chosen:
                raise ApiError(400, "tool_choice names no function of tools", param="tool_choice")
            return call_schema(chosen)
        format = self.response_format
        if format is None or format.type == "text":
            return None
        if format.type == "json_object":
            return ANY_OBJECT
        if format.json_schema is None:
            raise ApiError(400, "response_format of type json_schema needs json_schema", param="response_format")
        return format.json_schema.schema_ or ANY_OBJECT

    def conversation(self) -> list[dict[str, Any]]:
        return [message.as_dict() for message in self.messages]


def call_schema(functions: Sequence[Function]) -> dict[str, Any]:
    """Of a call of one of the functions: its name, and arguments."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, "arguments": function.parameters or ANY_OBJECT},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


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
