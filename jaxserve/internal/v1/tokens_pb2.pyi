from jaxserve.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectRequest(_message.Message):
    __slots__ = ("submit", "abort", "reset_prefix_cache")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RESET_PREFIX_CACHE_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    abort: Abort
    reset_prefix_cache: ResetPrefixCache
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., reset_prefix_cache: _Optional[_Union[ResetPrefixCache, _Mapping]] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[EngineRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[EngineRequest, _Mapping]]] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("request_id", "index", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ResetPrefixCache(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class EngineRequest(_message.Message):
    __slots__ = ("id", "prompt_token_ids", "params", "eos_token_ids", "bad_words", "cache_salt", "priority", "age_seconds", "timeout_seconds", "progress", "prompt_logprobs_sent")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PARAMS_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_SENT_FIELD_NUMBER: _ClassVar[int]
    id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    params: _inference_pb2.SamplingParams
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words: _containers.RepeatedCompositeFieldContainer[_inference_pb2.TokenIds]
    cache_salt: str
    priority: int
    age_seconds: float
    timeout_seconds: float
    progress: _containers.RepeatedCompositeFieldContainer[SampleProgress]
    prompt_logprobs_sent: int
    def __init__(self, id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., params: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., bad_words: _Optional[_Iterable[_Union[_inference_pb2.TokenIds, _Mapping]]] = ..., cache_salt: _Optional[str] = ..., priority: _Optional[int] = ..., age_seconds: _Optional[float] = ..., timeout_seconds: _Optional[float] = ..., progress: _Optional[_Iterable[_Union[SampleProgress, _Mapping]]] = ..., prompt_logprobs_sent: _Optional[int] = ...) -> None: ...

class SampleProgress(_message.Message):
    __slots__ = ("token_ids", "finished")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finished: bool
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., finished: _Optional[bool] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("step", "status", "info", "failure")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    INFO_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    step: EngineStep
    status: EngineStatus
    info: EngineInfo
    failure: str
    def __init__(self, step: _Optional[_Union[EngineStep, _Mapping]] = ..., status: _Optional[_Union[EngineStatus, _Mapping]] = ..., info: _Optional[_Union[EngineInfo, _Mapping]] = ..., failure: _Optional[str] = ...) -> None: ...

class EngineStep(_message.Message):
    __slots__ = ("outputs", "open_samples", "open_samples_here", "sent_at")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    OPEN_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    OPEN_SAMPLES_HERE_FIELD_NUMBER: _ClassVar[int]
    SENT_AT_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[SampleOutput]
    open_samples: int
    open_samples_here: int
    sent_at: float
    def __init__(self, outputs: _Optional[_Iterable[_Union[SampleOutput, _Mapping]]] = ..., open_samples: _Optional[int] = ..., open_samples_here: _Optional[int] = ..., sent_at: _Optional[float] = ...) -> None: ...

class SampleOutput(_message.Message):
    __slots__ = ("request_id", "index", "token_ids", "logprobs", "prompt_logprobs", "finish_reason", "stop_token_id", "stop_text", "cached_tokens", "preemptions", "scheduled_time")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    STOP_TEXT_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_TIME_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    finish_reason: str
    stop_token_id: int
    stop_text: str
    cached_tokens: int
    preemptions: int
    scheduled_time: float
    def __init__(self, request_id: _Optional[str] = ..., index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., stop_text: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., scheduled_time: _Optional[float] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("token_id", "logprob", "rank", "top_ids", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    rank: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class EngineStatus(_message.Message):
    __slots__ = ("phase", "detail", "step_seconds", "steps", "last_output_seconds", "open_samples", "open_samples_here", "stats_json")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    STEP_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LAST_OUTPUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OPEN_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    OPEN_SAMPLES_HERE_FIELD_NUMBER: _ClassVar[int]
    STATS_JSON_FIELD_NUMBER: _ClassVar[int]
    phase: str
    detail: str
    step_seconds: float
    steps: int
    last_output_seconds: float
    open_samples: int
    open_samples_here: int
    stats_json: str
    def __init__(self, phase: _Optional[str] = ..., detail: _Optional[str] = ..., step_seconds: _Optional[float] = ..., steps: _Optional[int] = ..., last_output_seconds: _Optional[float] = ..., open_samples: _Optional[int] = ..., open_samples_here: _Optional[int] = ..., stats_json: _Optional[str] = ...) -> None: ...

class EngineInfo(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...
