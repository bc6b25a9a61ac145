"""HttpConfig: settings of the HTTP application."""

import dataclasses

MiB = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """Bounds and switches of the HTTP application.

    Attributes:
        upload_limit: Bytes of an adapter file or a training file.
        body_limit: Bytes of any other body.
        request_timeout: Seconds for one response.
        body_timeout: Seconds for a client to send its body.
        header_timeout: Seconds for a client to send a request's headers.
        max_requests_per_minute: API calls of one tenant; None for no limit.
        max_tokens_per_minute: Prompt tokens and max_tokens of one tenant; None for no limit.
        cors_origins: Origins of web pages that may call the API, such as https://app.example.com.
        allowed_hosts: Names that the Host header may have; () for any.
        adapter_sources: Folders and hub addresses that adapters may be loaded from.
        metrics: Whether /metrics is served.
        openapi: Whether /openapi.json is served.
        otlp_traces_endpoint: OTLP/HTTP address that traces are sent to; None for no traces.
    """

    upload_limit: int = 64 * MiB
    body_limit: int = 4 * MiB
    request_timeout: float = 600.0
    body_timeout: float = 120.0
    header_timeout: float = 20.0
    max_requests_per_minute: int | None = None
    max_tokens_per_minute: int | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    adapter_sources: tuple[str, ...] = ()
    metrics: bool = True
    openapi: bool = True
    otlp_traces_endpoint: str | None = None
