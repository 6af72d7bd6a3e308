"""What requests and answers look like: OpenAI's shapes, and ours beside them.

Sampler settings have the names, limits and help of `GenerateSettings`; what a request leaves out is the model's own.
"""

from __future__ import annotations

from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from dllm.config import EditSampling, GenerateSettings, LikelihoodSettings, Settings
from dllm.config.settings import LARGEST_SEED, MANY, EstimatorName, RemaskingName, RevealRuleName

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Parameters of OpenAI's that this server does not have -> the values that ask for nothing, and are taken."""

MOST_TEXTS = 1024
"""Most messages, prompts, continuations or stop strings of one request."""

MOST_CHOICES = 64
"""Most texts that one request asks for: prompts times `n`."""


def setting(name: str, of: type[Settings] = GenerateSettings) -> Any:
    """An optional parameter with the limits and the help of a setting."""
    field = of.model_fields[name]
    limits = {type(limit).__name__.lower(): limit for limit in field.metadata if isinstance(limit, Ge | Gt | Le | Lt)}
    return Field(None, description=field.description, **{key: getattr(limit, key) for key, limit in limits.items()})


class Request(Settings):
    """A body. A parameter that is null counts as left out; one that is unknown is an error."""

    @model_validator(mode="before")
    @classmethod
    def what_is_null_is_left_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        for name in [name for name in given if name in UNSUPPORTED and name not in cls.model_fields]:
            value = given.pop(name)
            if not any(
                isinstance(value, bool) == isinstance(idle, bool) and value == idle for idle in UNSUPPORTED[name]
            ):
                raise PydanticCustomError(
                    "unsupported_parameter", "{name} is not supported by this server; leave it out", {"name": name}
                )
        return given


class TextPart(Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Request):
    """A turn of a conversation; `developer` is another word for `system`. Its text is text, whatever it spells."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def turn(self) -> dict[str, str]:
        """The turn as the package knows it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(Request):
    """What a stream also sends."""

    include_usage: bool = Field(False, description="a last chunk with `usage`")
    include_obfuscation: Literal[False] = Field(False, description="taken, since clients send it; always off")


class Sampling(Request):
    """What all requests for a text have in common."""

    model: str = Field(description="one of `GET /v1/models`")
    stream: bool = Field(False, description="send the text while it is made, as server-sent events")
    canvas: bool = Field(False, description="in a stream: also an event `canvas` with the whole canvas after each pass")
    stream_options: StreamOptions = StreamOptions()
    user: str | None = Field(None, description="taken, since clients send it; it changes nothing")
    seed: int | None = setting("seed")
    temperature: float | None = setting("temperature")
    top_p: float | None = setting("top_p")
    steps: int | None = setting("steps")
    block_size: int | None = setting("block_size")
    ahead: Literal["auto", "visible", "hidden"] | None = setting("ahead")
    reveal_rule: RevealRuleName | None = setting("reveal_rule")
    threshold: float | None = setting("threshold")
    factor: float | None = setting("factor")
    entropy_bound: float | None = setting("entropy_bound")
    remask: RemaskingName | None = setting("remask")
    remask_share: float | None = setting("remask_share")
    edit_threshold: float | None = setting("edit_threshold")
    edit_passes: int | None = setting("edit_passes")
    guidance: float | None = setting("guidance")
    reuse: Literal["none", "prefix", "dual"] | None = setting("reuse")
    refresh: int | None = setting("refresh")
    edits: EditSampling | None = setting("edits")

    def changes(self) -> dict[str, Any]:
        """The settings of the sampler that the request names."""
        names = GenerateSettings.model_fields.keys() & self.model_fields_set
        return {name: getattr(self, name) for name in names}

    @model_validator(mode="after")
    def canvases_are_streamed(self) -> Sampling:
        if self.canvas and not self.stream:
            raise ValueError("canvas = true needs stream = true; set both")
        return self


class Answering(Sampling):
    """What requests have in common whose text grows behind a prompt."""

    n: int = Field(1, ge=1, le=MOST_CHOICES, description="texts for each prompt; the i-th has the seed `seed + i`")
    stop: str | list[str] | None = Field(None, description="one or more strings that end a text, and are not in it")
    max_tokens: int | None = Field(None, gt=0, le=MANY, description="length of the canvas, in tokens")
    max_completion_tokens: int | None = Field(None, gt=0, le=MANY, description="another name of `max_tokens`")

    def changes(self) -> dict[str, Any]:
        """The settings of the sampler that the request names."""
        changes = super().changes()
        if self.stop is not None:
            changes["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if (length := self.max_completion_tokens or self.max_tokens) is not None:
            changes["max_new_tokens"] = length
        return changes

    @model_validator(mode="after")
    def one_length_good_seeds_and_few_stops(self) -> Answering:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one number; give one of them")
        if self.seed is not None and self.seed + self.n - 1 > LARGEST_SEED:
            raise ValueError(f"seed + n = {self.seed} + {self.n}: seeds are {LARGEST_SEED} at most; take a smaller one")
        if isinstance(self.stop, list) and len(self.stop) > 16:
            raise ValueError(f"stop has {len(self.stop)} strings; give 16 at most")
        if self.stop is not None and "" in ([self.stop] if isinstance(self.stop, str) else self.stop):
            raise ValueError("stop has an empty string, which would end every text at once; leave it out")
        return self


class ChatRequest(Answering):
    """A conversation to be answered."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_TEXTS)


class CompletionRequest(Answering):
    """Texts to be continued, or the token ids of texts."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(description="a text, several, or token ids")

    def prompts(self) -> list[str | list[int]]:
        """One or more prompts."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    @model_validator(mode="after")
    def some_prompts_and_few_choices(self) -> CompletionRequest:
        empty = [f"prompt[{number}]" for number, prompt in enumerate(self.prompts()) if prompt == []]
        if empty or self.prompt == []:
            raise ValueError(f"{[*empty, 'prompt'][0]} is an empty list; give a text, or one token id at least")
        if (count := len(self.prompts()) * self.n) > MOST_CHOICES:
            raise ValueError(f"prompt and n ask for {count} texts; ask for {MOST_CHOICES} at most")
        return self


class InfillRequest(Sampling):
    """A text with holes, each a mask token of the model (`[MASK]` for a BERT)."""

    text: str = Field(min_length=1)


class Given(Request):
    """What a text stands behind: a text or a conversation."""

    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MOST_TEXTS)

    def given(self) -> str | list[dict[str, str]] | None:
        """The prompt, the conversation's turns, or None."""
        return self.prompt if self.messages is None else [message.turn() for message in self.messages]

    @model_validator(mode="after")
    def one_of_them(self) -> Given:
        if None not in (self.prompt, self.messages):
            raise ValueError("prompt and messages are both given; give one of them")
        return self


class EditRequest(Sampling, Given):
    """A draft to be made better, by a model that edits; it may answer a conversation or continue a text."""

    draft: str
    max_tokens: int | None = Field(
        None, gt=0, le=MANY, description="most tokens of the edited text; a longer draft may stay as long"
    )

    def changes(self) -> dict[str, Any]:
        """The settings of the sampler that the request names."""
        return super().changes() | ({"max_new_tokens": self.max_tokens} if self.max_tokens else {})


class ScoreRequest(Given):
    """Continuations of one prompt whose likelihood is asked for; without a prompt, that of whole texts."""

    model: str = Field(description="one of `GET /v1/models`")
    continuations: list[str] = Field(min_length=1, max_length=MOST_TEXTS)
    estimator: EstimatorName | None = setting("estimator", LikelihoodSettings)
    budget: int | None = setting("budget", LikelihoodSettings)
    block_size: int | None = setting("block_size", LikelihoodSettings)
    mc_draws: int | None = setting("mc_draws", LikelihoodSettings)
    mc_batch: int | None = setting("mc_batch", LikelihoodSettings)
    seed: int | None = setting("seed", LikelihoodSettings)

    def settings(self) -> LikelihoodSettings:
        """How the bound is estimated. Raises ValidationError."""
        names = LikelihoodSettings.model_fields.keys() & self.model_fields_set
        return LikelihoodSettings.model_validate({name: getattr(self, name) for name in names})


# --------------------------------------------------------------------------------------------------------------------
# Answers


class Usage(Settings):
    """Tokens of prompts and of texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Cost(Settings):
    """What a text took, beside OpenAI's `usage`: the forward passes, the seconds from its arrival, its (first) seed."""

    passes: int
    seconds: float
    seed: int


FinishReason = Literal["stop", "length"]


class Reply(Settings):
    """The text of a choice."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Settings):
    """One answer. It ended by itself or at a stop string (`stop`), or its canvas was full (`length`)."""

    index: int
    message: Reply
    logprobs: None = None
    finish_reason: FinishReason


class TextChoice(Settings):
    """One text."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class Made(Settings):
    """What every answer begins with."""

    id: str
    created: int = Field(description="seconds since 1970")
    model: str


class ChatCompletion(Made):
    """An answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    dllm: Cost


class TextCompletion(Made):
    """Texts behind prompts; or a text whose holes are filled, or that was edited."""

    object: Literal["text_completion", "infill", "edit"]
    choices: list[TextChoice]
    usage: Usage
    dllm: Cost


class Delta(Settings):
    """What a chunk adds to a text."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(Settings):
    """What a chunk adds to a choice."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None


class CanvasState(Settings):
    """The canvas of a choice after a pass; of a model that edits a draft, the draft's pieces as `edits`."""

    index: int
    step: int = Field(description="forward passes so far")
    pieces: list[str | None] | None = Field(None, description="what each position shows; null while it is masked")
    confidence: list[float] | None = Field(None, description="the probability that each had when it was revealed")
    revealed: list[int] | None = Field(None, description="positions that this pass revealed")
    edits: list[tuple[Literal["kept", "gone", "new"], str]] | None = Field(
        None, description="pieces of the draft, and what the pass did to them"
    )


class ChatChunk(Made):
    """A chunk of a stream; an event `canvas` has no choices, so that OpenAI's clients pass over it."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChunkChoice]
    canvas: CanvasState | None = None
    usage: Usage | None = None
    dllm: Cost | None = None


class TextChunk(Made):
    """A chunk of a stream of text."""

    object: Literal["text_completion", "infill.chunk", "edit.chunk"]
    choices: list[TextChoice]
    canvas: CanvasState | None = None
    usage: Usage | None = None
    dllm: Cost | None = None


class ScoreOf(Settings):
    """A bound on -log p(continuation | prompt) in nats, lower is better; its standard error is 0 where it is exact."""

    index: int
    nats: float
    standard_error: float
    passes: int
    tokens: int


class Scores(Settings):
    """One score for each continuation, in their order."""

    object: Literal["list"]
    model: str
    data: list[ScoreOf]
    usage: Usage


class ModelCard(Settings):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["dllm"]
    dllm: ModelFacts


class ModelFacts(Settings):
    """What a client may want to know of a model: how it was trained, its tokens, how it samples by itself."""

    algorithm: str
    context: int = Field(description="most tokens of prompt and text together")
    parameters: int
    mask_token: str | None
    end_token: str | None
    end_of_turn: str | None = Field(description="what ends an answer before that")
    edits: bool = Field(description="whether `/v1/edit` takes it")
    chat: bool = Field(description="whether it has a chat template")
    defaults: dict[str, Any]


class Models(Settings):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


ErrorType = Literal["invalid_request_error", "rate_limit_error", "server_error"]


class FailureOf(Settings):
    """What went wrong."""

    message: str
    type: ErrorType
    param: str | None
    code: str


class Failure(Settings):
    """An error, as OpenAI's."""

    error: FailureOf
