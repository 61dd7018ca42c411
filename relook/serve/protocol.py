"""Requests and replies of the API, in OpenAI's shapes."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

# ----------------------------------------------------------------------------------------------------

MAX_TOP = 20  # most likely tokens at a position, as at OpenAI


class _Strict(BaseModel):
    """Refuse a field that nothing reads, unless it is null: clients write out what they do not set."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        return {key: value for key, value in fields.items() if value is not None} if type(fields) is dict else fields


def _only(*values: Any) -> AfterValidator:
    """Validate a field that is not followed: it may state what happens anyway.

    Raises:
        PydanticCustomError: it asks for something else.
    """
    no_effect = " or ".join(json.dumps(value) for value in values)

    def check(value: Any) -> Any:
        # In Python 0 == False and 1 == True.
        if any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in values):
            return value
        raise PydanticCustomError(
            "not_supported",
            "This server does not follow it. Leave it out, or send {no_effect}.",
            {"no_effect": no_effect},
        )

    return AfterValidator(check)


class ImageURL(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


# Each new token is compared with all that a stop may begin with.
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any, info: ValidationInfo) -> Any:
    """Write a message's content as a list of parts; only an assistant's may be missing, as after a refusal."""
    if content is None and info.data.get("role") == "assistant":
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise PydanticCustomError("content_type", "Input should be a string or a list of parts that is not empty.")
    return content


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], Field(fail_fast=True), BeforeValidator(_as_parts), Field(validate_default=True)] = (
        None  # type: ignore[assignment]
    )
    name: str | None = None  # changes no answer: the templates name nobody
    tool_calls: Annotated[Any, _only([])] = None
    annotations: Annotated[Any, _only([])] = None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, _only(False)] = None
    continuous_usage_stats: Annotated[Any, _only(False)] = None


class ChatRequest(_Strict):
    """A chat request with OpenAI's fields, and vLLM's.

    What would change an answer is followed, or refused by name; what changes none (`user`, `metadata`, ...) is accepted
    and ignored.
    """

    model: str
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Stop | Annotated[list[Stop], Field(max_length=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP)] = None
    # Not followed.
    frequency_penalty: Annotated[Any, _only(0)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    logit_bias: dict[str, Annotated[Any, _only(0)]] | None = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    verbosity: Annotated[Any, _only("medium")] = None
    # Not followed; vLLM's.
    top_k: Annotated[Any, _only(-1, 0)] = None
    min_p: Annotated[Any, _only(0)] = None
    min_tokens: Annotated[Any, _only(0)] = None
    repetition_penalty: Annotated[Any, _only(1)] = None
    length_penalty: Annotated[Any, _only(1)] = None
    best_of: Annotated[Any, _only(1)] = None
    use_beam_search: Annotated[Any, _only(False)] = None
    stop_token_ids: Annotated[Any, _only([])] = None
    bad_words: Annotated[Any, _only([])] = None
    allowed_token_ids: Annotated[Any, _only([])] = None
    logits_processors: Annotated[Any, _only([])] = None
    include_stop_str_in_output: Annotated[Any, _only(False)] = None
    ignore_eos: Annotated[Any, _only(False)] = None
    skip_special_tokens: Annotated[Any, _only(True)] = None
    add_generation_prompt: Annotated[Any, _only(True)] = None
    continue_final_message: Annotated[Any, _only(False)] = None
    add_special_tokens: Annotated[Any, _only(False)] = None
    echo: Annotated[Any, _only(False)] = None
    documents: Annotated[Any, _only([])] = None
    chat_template_kwargs: Annotated[Any, _only({})] = None
    mm_processor_kwargs: Annotated[Any, _only({})] = None
    return_tokens_as_token_ids: Annotated[Any, _only(False)] = None
    return_token_ids: Annotated[Any, _only(False)] = None
    priority: Annotated[Any, _only(0)] = None
    # Not followed; vLLM's router adds them to each request.
    no_stop_trim: Annotated[Any, _only(False)] = None
    return_hidden_states: Annotated[Any, _only(False)] = None
    # Change no answer.
    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None  # speeds up an answer at OpenAI
    parallel_tool_calls: bool | None = None  # there are no tools
    include_reasoning: bool | None = None  # there is no reasoning
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    spaces_between_special_tokens: bool | None = None  # of which an answer shows none


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    content: list[TokenLogprob]


Finish = Literal["stop", "length"]


class ResponseMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int
    message: ResponseMessage
    logprobs: Logprobs | None = None
    finish_reason: Finish


class PromptDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Completion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: Finish | None = None


class Chunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "relook"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "failed"]


class ErrorContent(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorContent


# ----------------------------------------------------------------------------------------------------
# Errors of the API in OpenAI's shape.

# OpenAI's name for each kind of error; 4xx that have none are invalid requests.
TYPES = {
    401: "authentication_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class APIError(Exception):
    """Tell a client what is wrong; `param` names the field of its request that is at fault."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        message = f"{self.param}: {self.message}" if self.param else self.message
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Tell the client when to try again."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}
