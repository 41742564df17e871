"""What clients send and get, as OpenAI's API has it; a video is given like a picture."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _is_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a character (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_is_text)]


class _Given(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Url(_Given):
    """Where a picture or a video is: a data URL, or `file_id` of an upload; an http(s) URL where the server allows it."""

    url: Text | None = Field(None, examples=["data:image/png;base64,…"])
    file_id: Text | None = None
    detail: Literal["auto", "low", "high"] = Field("auto", description="Has no effect: the model decides.")

    @model_validator(mode="after")
    def _one(self) -> Url:
        if (self.url is None) == (self.file_id is None):
            raise ValueError("expected either url or file_id")
        return self


class VideoUrl(_Given):
    """A video, or a part of it."""

    url: Text | None = Field(None, examples=["data:video/mp4;base64,…"])
    data: Text | None = Field(None, description="The file in base64.")
    file_id: Text | None = Field(None, examples=["file-0123"])
    format: Text | None = Field(None, description="Has no effect: the file says what it is.")
    fps: float | None = Field(
        None, gt=0, le=1000, description="Frames taken per second: 1, or any rate where frames is given."
    )
    frames: int | None = Field(None, ge=1, description="At most so many, spread over the whole.")
    start: float | None = Field(None, ge=0, le=1e9, description="Seconds.")
    end: float | None = Field(None, gt=0, le=1e9, description="Seconds.")

    @model_validator(mode="after")
    def _one(self) -> VideoUrl:
        if (self.url, self.data, self.file_id).count(None) != 2:
            raise ValueError("expected one of url, data and file_id")
        return self


class TextPart(_Given):
    """Words."""

    type: Literal["text"]
    text: Text


class ImagePart(_Given):
    """A picture."""

    type: Literal["image_url"]
    image_url: Url


class VideoUrlPart(_Given):
    """A video."""

    type: Literal["video_url"]
    video_url: VideoUrl


class InputVideoPart(_Given):
    """A video, under the other name that clients give it."""

    type: Literal["input_video"]
    input_video: VideoUrl


Part = Annotated[TextPart | ImagePart | VideoUrlPart | InputVideoPart, Field(discriminator="type")]


class Turn(_Given):
    """One message. A system's or developer's is put in front of the next user's turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part] | None = None
    name: Text | None = Field(None, description="Has no effect.")
    refusal: Text | None = Field(None, description="Has no effect.")
    # what answers have, given back with nothing in it
    annotations: list[Any] | None = Field(None, max_length=0)
    tool_calls: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None


class StreamOptions(_Given):
    """What a stream holds."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = False


class TextFormat(_Given):
    """Plain text is the only one."""

    type: Literal["text"]


class VideoKwargs(_Given):
    """For all videos of a request, as vLLM's clients give it."""

    num_frames: int | None = Field(None, ge=-1, description="So many, spread over the whole; -1: all.")
    fps: float | None = Field(None, gt=0, le=1000)

    @model_validator(mode="after")
    def _some(self) -> VideoKwargs:
        if self.num_frames == 0:
            raise ValueError("num_frames is 0: expected -1 or at least 1")
        return self


class MediaKwargs(_Given):
    """For all media of a request."""

    video: VideoKwargs = VideoKwargs()


class ChatRequest(_Given):
    """A conversation that ends with a question."""

    model: Text | None = Field(None, description="The served model's name, or empty.")
    messages: list[Turn] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, description="0, the default, is greedy.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1: all.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = None
    n: int | None = Field(None, ge=1)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    media_io_kwargs: MediaKwargs | None = None
    ignore_eos: bool | None = Field(False, description="Go on after an end token, up to max_tokens; to measure with.")
    timeout: float | None = Field(None, gt=0, description="Seconds for this request; at most the server's.")
    # taken where they ask for nothing that is not done
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _stops(self) -> ChatRequest:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 16 or not all(0 < len(s) <= 256 for s in stops):
            raise ValueError("stop: expected at most 16 texts of 1 to 256 characters")
        return self


class Message(BaseModel):
    """An answer's text."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One answer."""

    index: int
    message: Message
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class Usage(BaseModel):
    """Positions of the decoder: a picture takes as many as it has vision tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timing(BaseModel):
    """Seconds: waiting for a slot, encoding pictures and prompt, until the first token, and in all."""

    waited: float
    encode: float
    first_token: float
    total: float


def completion_id() -> str:
    """A new one."""
    return f"chatcmpl-{uuid.uuid4().hex}"


class ChatCompletion(BaseModel):
    """Answers."""

    id: str = Field(default_factory=completion_id)
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[Choice]
    usage: Usage
    timing: Timing


class Delta(BaseModel):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None


class Chunk(BaseModel):
    """A piece of a stream; the last one has the usage where that was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    timing: Timing | None = None


class Model(BaseModel):
    """What is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lmm-jax"


class Models(BaseModel):
    """One."""

    object: Literal["list"] = "list"
    data: list[Model]


class File(BaseModel):
    """An upload."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"


class Files(BaseModel):
    """All uploads, the newest first."""

    object: Literal["list"] = "list"
    data: list[File]
    has_more: Literal[False] = False


class Deleted(BaseModel):
    """An upload that is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """Any answer that is not a 2xx."""

    error: ErrorDetail


class Health(BaseModel):
    """Whether questions are answered."""

    status: Literal["ok", "failed"]
