"""Every error that the project raises on purpose.

    DynamoError
    ├── ConfigError              a bad YAML file, override or setting                  exit 1
    │   └── GraphError           a bad service, dependency, link or graph module       exit 1
    │       ├── EndpointMissingError  a call to a method that is no endpoint           HTTP 500
    │       └── NotLinkedError   the use of a dependency that the graph leaves out     HTTP 500
    ├── StartError               a process of the graph could not start                exit 1
    ├── RequestError             the request is at fault                               HTTP 400
    │   ├── ContextLengthError   prompt and output do not fit the model                HTTP 400
    │   └── ModelNotFoundError   no such model here                                    HTTP 404
    ├── BadCallError             a service sent another data of a wrong type           HTTP 500
    ├── OverloadedError          more work than the graph accepts: try again           HTTP 429
    ├── UnavailableError         temporarily unavailable: try again                    HTTP 503
    │   ├── NoInstancesError     no instance of the endpoint is registered
    │   └── WorkerLostError      the instance that was answering died
    ├── DeadlineError            the request's deadline has passed                     HTTP 504
    ├── TransportError           etcd, NATS or an RPC connection failed                HTTP 503
    ├── EngineError              the inference engine failed                           HTTP 500
    │   └── EngineDeadError      the engine has stopped for good                       HTTP 500
    └── RemoteError              a remote endpoint raised a class unknown here         HTTP 500

A message says what failed, for what, and the fact; `hint` says what to do, in the imperative. Errors cross process
boundaries as data (`dynamo.rpc.remote_errors`) and are raised there as the same class.
"""

from __future__ import annotations

from typing import ClassVar


class DynamoError(Exception):
    """Base of all errors. `status` is the HTTP status and `code` the OpenAI error code that a client gets."""

    status: ClassVar[int] = 500
    code: ClassVar[str | None] = None
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(DynamoError):
    """A bad YAML file, override or setting."""


class GraphError(ConfigError, ValueError, TypeError):
    """A bad service, dependency, link or graph module. Also a ValueError and a TypeError, which the 0.x SDK raised."""


class EndpointMissingError(GraphError, AttributeError):
    """A service calls a method of another one that is no endpoint. Also an AttributeError, for `hasattr`."""


class NotLinkedError(GraphError, AttributeError):
    """A service uses a dependency that its graph leaves out. Also an AttributeError, for `hasattr`."""


class StartError(DynamoError):
    """A process of the graph could not start."""


class RequestError(DynamoError):
    """The request is at fault; `param` names the field."""

    status = 400


class ContextLengthError(RequestError):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"


class ModelNotFoundError(RequestError):
    """No model of that name is served."""

    status = 404
    code = "model_not_found"


class BadCallError(DynamoError):
    """A service sent another one data that does not fit the endpoint's declared type: a bug of the sender, not the client."""


class OverloadedError(DynamoError):
    """More work than the graph accepts; the client may try again."""

    status = 429
    code = "overloaded"


class UnavailableError(DynamoError):
    """Temporarily unavailable; the client may try again."""

    status = 503
    code = "unavailable"


class NoInstancesError(UnavailableError):
    """No instance of the endpoint is registered."""


class WorkerLostError(UnavailableError):
    """The instance that was answering died or became unreachable."""

    code = "worker_lost"


class DeadlineError(DynamoError):
    """The request's deadline has passed."""

    status = 504
    code = "deadline_exceeded"


class TransportError(DynamoError):
    """etcd, NATS or an RPC connection failed."""

    status = 503
    code = "transport"


class EngineError(DynamoError):
    """The inference engine failed."""

    code = "engine_error"


class EngineDeadError(EngineError):
    """The engine has stopped for good; another worker can take over its requests."""

    code = "engine_dead"


class RemoteError(DynamoError):
    """A remote endpoint raised an exception whose class does not exist in this process."""
