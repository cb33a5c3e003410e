"""The error tree of client and server.

    EmaError
    |-- TransportError            no answer came
    |   |-- ServiceUnreachable    nothing listens at the URL
    |   |-- ConnectionLost        the connection broke in the middle
    |   |-- GatewayFailed         a gateway answered that it has no answer of the service
    |   +-- UpdatesPending        flush(timeout=) ended before all updates were applied
    |-- ProtocolError             an answer came that no ema-service gives
    |-- DestinationFailed         where weights are published refuses them, or cannot be reached
    |-- UsageError                the caller's own mistake, seen before anything was sent
    |   |-- InvalidDecay          outside [0, 1]; also a ValueError
    |   |-- NameCollision         two parameters share one canonical name
    |   |-- NothingStored         restore() without store()
    |   +-- AlreadyStored         store() over a stored copy; a scope inside a scope
    |-- BadRequest                400: not HTTP/1.1
    |-- Unauthorized              401: no token, or none the server knows
    |-- Forbidden                 403: the token does not allow this
    |-- ForeignOrigin             403: a web page of another origin wants to write
    |-- NotFound                  404
    |   |-- RouteNotFound, RunNotFound, SnapshotNotFound, AverageNotFound
    |-- MethodNotAllowed          405
    |-- RequestTimeout            408
    |-- Conflict                  409
    |   |-- RunExists, AwaitingWeights, WeightsExist, StepConflict, StaleStep, Fenced,
    |   |-- StepNotReached, VersionGone, SnapshotExists, SnapshotDamaged, StorageDisabled, RunDegraded,
    |   |-- SegmentUnusable, TooManyRuns, TooManySnapshots,
    |   +-- AverageExists, LastAverage, TooManyAverages
    |-- BodyTooLarge              413
    |-- UnsupportedEncoding       415: a compressed body
    |-- UnsupportedMediaType      415: JSON that is not sent as JSON
    |-- RangeNotSatisfiable       416
    |-- ForeignHost               421: the server does not answer to that name
    |-- ReadOnlyReplica           421: a replica of another server, which is the one to ask
    |-- Invalid                   422
    |   |-- InvalidRequest        a field of the JSON body, the path or the query
    |   |-- MalformedBody         not a well-formed safetensors stream
    |   |-- DigestMismatch        not the bytes that were sent: send them again
    |   |-- LayoutMismatch        well-formed, but not the tensors of this run
    |   |-- SynthesisRefused      an average that the run's snapshots do not give
    |   +-- NonFinite             NaN or Inf where the run refuses them
    |-- HeadTooLarge              431: too many or too long header fields
    |-- InternalError             500: a defect of the server
    |-- StorageFailed             503: the server's disk is full or fails
    |-- Overloaded                503: out of a declared budget, try again later
    |-- Stopping                  503: the server was told to stop
    +-- Superseded                503: the run changed while the update was on its way, send it again

Each class carries ``code`` (its name on the wire), ``status`` (HTTP) and ``retryable``; each instance a ``detail``
(what was wrong) and a ``hint`` (what to do). On the wire an error is RFC 9457 ``application/problem+json``; the
client raises the class whose ``code`` the server sent.

Knows: names, texts and the mapping code <-> class. Does not know: HTTP libraries, routes, or who raises which error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

__all__ = [
    "AlreadyStored",
    "AverageExists",
    "AverageNotFound",
    "AwaitingWeights",
    "BadRequest",
    "BodyTooLarge",
    "Conflict",
    "ConnectionLost",
    "DestinationFailed",
    "DigestMismatch",
    "EmaError",
    "Fenced",
    "Forbidden",
    "ForeignHost",
    "ForeignOrigin",
    "GatewayFailed",
    "HeadTooLarge",
    "InternalError",
    "Invalid",
    "InvalidDecay",
    "InvalidRequest",
    "LastAverage",
    "LayoutMismatch",
    "MalformedBody",
    "MethodNotAllowed",
    "NameCollision",
    "NonFinite",
    "NotFound",
    "NothingStored",
    "Overloaded",
    "ProtocolError",
    "RangeNotSatisfiable",
    "ReadOnlyReplica",
    "RequestTimeout",
    "RouteNotFound",
    "RunDegraded",
    "RunExists",
    "RunNotFound",
    "SegmentUnusable",
    "ServiceUnreachable",
    "SnapshotDamaged",
    "SnapshotExists",
    "SnapshotNotFound",
    "StaleStep",
    "StepConflict",
    "StepNotReached",
    "Stopping",
    "StorageDisabled",
    "StorageFailed",
    "Superseded",
    "SynthesisRefused",
    "TooManyAverages",
    "TooManyRuns",
    "TooManySnapshots",
    "TransportError",
    "Unauthorized",
    "UnsupportedEncoding",
    "UnsupportedMediaType",
    "UpdatesPending",
    "UsageError",
    "VersionGone",
    "WeightsExist",
    "error_from_problem",
    "listed",
    "printable",
]

PROBLEM_JSON = "application/problem+json"

#: So many names stand in a message; the rest is counted.
LISTED = 5


class EmaError(Exception):
    """Base of everything that client and server raise on purpose.

    The texts quote what came from the other side, and end in logs and on terminals: see printable().

    Args:
        detail: what was wrong, by name.
        hint: what the reader should do.
        retry_after: seconds after which trying again makes sense (503 only).
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False
    title: ClassVar[str] = "Error"
    default_hint: ClassVar[str] = ""

    def __init__(self, detail: str, *, hint: str | None = None, retry_after: float | None = None) -> None:
        self.detail = printable(detail)
        super().__init__(self.detail)
        self.hint = self.default_hint if hint is None else printable(hint)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"{self.detail} ({self.hint})" if self.hint else self.detail

    def to_problem(self) -> dict[str, Any]:
        """The RFC 9457 body of this error."""
        return {
            "type": f"urn:ema-service:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            "hint": self.hint,
            "retryable": self.retryable,
        }


class TransportError(EmaError):
    """No answer came. Retrying is safe: every write of the protocol is idempotent.

    silence: seconds that passed without a sign of life before the wait was given up.
    """

    silence: float = 0.0

    code = "transport"
    status = 0
    retryable = True
    title = "Transport failed"


class ServiceUnreachable(TransportError):
    """Nothing accepts connections at the service's URL."""

    code = "unreachable"
    title = "Service unreachable"
    default_hint = "start a server with `ema-service serve`, or set EMA_SERVICE_URL to the address of a running one"


class ConnectionLost(TransportError):
    """The connection broke or timed out after the request was begun."""

    code = "connection_lost"
    title = "Connection lost"
    default_hint = "look at the server's log; the request may be repeated, a write is applied once at most"


class GatewayFailed(TransportError):
    """A gateway (a proxy, a load balancer) answered in place of the service: 408, 429, 502, 503, 504."""

    code = "gateway_failed"
    title = "Gateway without an answer of the service"
    default_hint = "look whether the service runs, and at the gateway's log; the request may be repeated"


class UpdatesPending(TransportError):
    """flush() was given a time, at whose end updates were still on their way. The updates are sent on."""

    code = "updates_pending"
    title = "Updates still on their way"
    default_hint = "flush again, with more time; ema.stats and the log tell how the sending goes"


class ProtocolError(EmaError):
    """An answer breaks the protocol: another program answered, a proxy, or another version of the service."""

    code = "protocol"
    status = 0
    title = "Unexpected answer"
    default_hint = "check that the URL is that of an ema-service, and that no proxy stands between"


class DestinationFailed(EmaError):
    """The bucket or hub that weights are published to refuses them, is not there, or cannot be reached."""

    code = "destination_failed"
    status = 0
    title = "Not published"
    default_hint = "what was published there before is still there; publish again once this is put right"


class UsageError(EmaError):
    """A mistake of the caller, found before anything was sent or overwritten."""

    code = "usage"
    status = 0
    title = "Wrong use"


class InvalidDecay(UsageError, ValueError):
    """A decay outside [0, 1]: a ValueError, as LitEma raises it."""

    code = "invalid_decay"
    title = "Decay outside [0, 1]"
    default_hint = "a decay is the share of the old average that an update keeps, such as 0.9999"


class NameCollision(UsageError):
    """Two parameters share a name once wrappers' prefixes (or dots) are removed."""

    code = "name_collision"
    title = "Names collide"
    default_hint = "rename one of the two modules"


class NothingStored(UsageError):
    """restore() was called with nothing stored."""

    code = "nothing_stored"
    title = "Nothing stored"
    default_hint = "call store(parameters) before copy_to(model), or use `with ema.scope(model):`"


class AlreadyStored(UsageError):
    """store() was called while a stored copy waits to be restored."""

    code = "already_stored"
    title = "Already stored"
    default_hint = "restore() first: storing again would lose the training weights"


class BadRequest(EmaError):
    code = "bad_request"
    status = 400
    title = "Not HTTP/1.1"
    default_hint = "send one Content-Length or chunks, not both, lines that end in CRLF, and no folded header lines"


class Unauthorized(EmaError):
    code = "unauthorized"
    status = 401
    title = "No valid token"
    default_hint = "pass token=, or set EMA_SERVICE_TOKEN; `ema-service token create` on the server makes one"


class Forbidden(EmaError):
    code = "forbidden"
    status = 403
    title = "The token does not allow this"
    default_hint = "ask for a token with that scope (a trainer's is `train`) and a pattern that the run's name fits"


class ForeignOrigin(EmaError):
    code = "foreign_origin"
    status = 403
    title = "A web page of another origin"
    default_hint = "a browser may write from the service's own pages alone; programs send no Origin, no Sec-Fetch-Site"


class NotFound(EmaError):
    code = "not_found"
    status = 404
    title = "Not found"


class RouteNotFound(NotFound):
    code = "route_not_found"
    title = "No such route"
    default_hint = "see /docs on the server for the list of routes"


class RunNotFound(NotFound):
    code = "run_not_found"
    title = "No such run"
    default_hint = "`ema runs` lists the runs of this server; POST /v1/runs creates one"


class SnapshotNotFound(NotFound):
    code = "snapshot_not_found"
    title = "No such snapshot"
    default_hint = "GET /v1/runs/{run}/snapshots lists them"


class AverageNotFound(NotFound):
    code = "average_not_found"
    title = "No such average"
    default_hint = "the run's `averages` lists the names"


class MethodNotAllowed(EmaError):
    code = "method_not_allowed"
    status = 405
    title = "Method not allowed"
    default_hint = "see /docs on the server for the methods of this route"


class RequestTimeout(EmaError):
    code = "request_timeout"
    status = 408
    retryable = True
    title = "The request came too slowly"
    default_hint = "send again; nothing was changed"


class Conflict(EmaError):
    code = "conflict"
    status = 409
    title = "Conflict"


class RunExists(Conflict):
    code = "run_exists"
    title = "Run exists"
    default_hint = "choose another run name, or delete the old run first"


class AwaitingWeights(Conflict):
    code = "awaiting_weights"
    title = "Run has no weights yet"
    default_hint = "PUT /v1/runs/{run}/weights with the initial parameters first"


class WeightsExist(Conflict):
    code = "weights_exist"
    title = "Run has its initial weights"
    default_hint = "push updates instead, or delete the run to begin anew"


class StepConflict(Conflict):
    code = "step_conflict"
    title = "Step was applied with other bytes"
    default_hint = "two trainers push to one run, or a step was used twice; each step is applied once"


class StaleStep(Conflict):
    code = "stale_step"
    title = "Step is in the past"
    default_hint = "push steps in growing order; GET /v1/runs/{run} tells the run's step"


class Fenced(Conflict):
    code = "fenced"
    title = "Another trainer has taken over"
    default_hint = "stop this trainer; if it is the right one, attach anew: POST /v1/runs/{run}/writers"


class StepNotReached(Conflict):
    code = "step_not_reached"
    retryable = True
    title = "The run has not reached that step"
    default_hint = "wait longer, or ask for a smaller min_step"


class VersionGone(Conflict):
    code = "version_gone"
    retryable = True
    title = "Another version has taken its place"
    default_hint = "ask for the run's version, and for that one"


class SnapshotExists(Conflict):
    code = "snapshot_exists"
    title = "Snapshot exists"
    default_hint = "snapshots are immutable: choose another name, or delete the old one"


class SnapshotDamaged(Conflict):
    code = "snapshot_damaged"
    title = "The snapshot's file cannot be read"
    default_hint = "restore the file in the server's data dir, or delete the snapshot"


class StorageDisabled(Conflict):
    code = "storage_disabled"
    title = "This server keeps nothing on disk"
    default_hint = "start the server without --memory to keep snapshots and checkpoints"


class TooManyRuns(Conflict):
    code = "too_many_runs"
    title = "No room for another run"
    default_hint = "delete runs that are done: `ema delete`"


class TooManySnapshots(Conflict):
    code = "too_many_snapshots"
    title = "No room for another snapshot of this run"
    default_hint = "delete snapshots that nobody needs any more, or start the server with a larger --max-snapshots"


class AverageExists(Conflict):
    code = "average_exists"
    title = "Average exists"
    default_hint = "choose another name, or remove the average first"


class LastAverage(Conflict):
    code = "last_average"
    title = "The run would be left without an average"
    default_hint = "add another average first, or delete the run"


class TooManyAverages(Conflict):
    code = "too_many_averages"
    title = "No room for another average of this run"
    default_hint = "remove an average that nobody needs any more"


class RunDegraded(Conflict):
    code = "run_degraded"
    title = "The run's latest state cannot be read"
    default_hint = (
        "go back to a snapshot, or accept the version that is there: POST /v1/runs/{run}/rewind; or restore the run's "
        "files from a backup and restart the server"
    )


class SegmentUnusable(Conflict):
    code = "segment_unusable"
    title = "The shared memory cannot be used"
    default_hint = "send the tensors in the body; client and server share memory on one host, as one user"


class BodyTooLarge(EmaError):
    code = "body_too_large"
    status = 413
    title = "Body too large"


class UnsupportedEncoding(EmaError):
    code = "unsupported_encoding"
    status = 415
    title = "Encoded body"
    default_hint = "send the body as it is, without Content-Encoding"


class UnsupportedMediaType(EmaError):
    code = "unsupported_media_type"
    status = 415
    title = "Not sent as JSON"
    default_hint = "send the header Content-Type: application/json"


class RangeNotSatisfiable(EmaError):
    code = "range_not_satisfiable"
    status = 416
    title = "Range not satisfiable"
    default_hint = "ask for bytes that exist; HEAD or a GET without Range tells the length"


class ForeignHost(EmaError):
    code = "foreign_host"
    status = 421
    title = "The server does not answer to that name"
    default_hint = (
        "use the server's IP address in the URL, or localhost on its own machine; or start the server with "
        "--allowed-host NAME, or with tokens"
    )


class ReadOnlyReplica(EmaError):
    code = "read_only_replica"
    status = 421
    title = "A replica is read alone"
    default_hint = "send it to the original, which the detail names; the replica follows it"


class Invalid(EmaError):
    code = "invalid"
    status = 422
    title = "Invalid"


class InvalidRequest(Invalid):
    code = "invalid_request"
    title = "Invalid request"
    default_hint = "correct the named field; /docs on the server shows what each accepts"


class MalformedBody(Invalid):
    code = "malformed_body"
    title = "Not a safetensors body"
    default_hint = "send a body as safetensors.torch.save_file writes it"


class DigestMismatch(Invalid):
    """Bytes changed between the two ends, and nothing was changed by them."""

    code = "digest_mismatch"
    retryable = True
    title = "Not the bytes that were sent"
    default_hint = "it is tried again by itself; where it comes often, memory, a cable or a proxy on the way is broken"


class LayoutMismatch(Invalid):
    code = "layout_mismatch"
    title = "Tensors differ from the run's layout"
    default_hint = "send exactly the tensors the run was created with, or create a new run for the changed model"


class SynthesisRefused(Invalid):
    """An average that cannot be worked out of the run's snapshots, or not as exactly as was asked for."""

    code = "synthesis_refused"
    title = "Not to be had from the run's snapshots"
    default_hint = "ask for what the message names instead, or for GET /v1/runs/{run}/profiles, which says what can be"


class NonFinite(Invalid):
    code = "non_finite"
    title = "NaN or Inf in the parameters"
    default_hint = "the EMA is as it was; look at the loss and the gradients of this step"


class HeadTooLarge(EmaError):
    code = "head_too_large"
    status = 431
    title = "Header fields too large"
    default_hint = "send fewer or shorter header fields, or a shorter URL"


class InternalError(EmaError):
    code = "internal"
    status = 500
    title = "Defect of the server"
    default_hint = "the server's log has the traceback under this request; please report it"


class Overloaded(EmaError):
    code = "overloaded"
    status = 503
    retryable = True
    title = "Out of a declared budget"
    default_hint = "try again after Retry-After seconds, or raise the budget named in the detail"


class Stopping(EmaError):
    code = "stopping"
    status = 503
    retryable = True
    title = "The server is stopping"
    default_hint = "nothing was changed; send again once a server is there"


class StorageFailed(EmaError):
    code = "storage_failed"
    status = 503
    retryable = True
    title = "The server could not write to its disk"
    default_hint = "make room in the server's data dir and try again; nothing was changed"


class Superseded(EmaError):
    code = "superseded"
    status = 503
    retryable = True
    title = "The run changed meanwhile"
    default_hint = "nothing was changed; send the update again"


def printable(text: str) -> str:
    """``text`` on one line of visible characters: all others, such as a terminal's escape sequences, are spelt out."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def listed(names: Iterable[str], separator: str = ", ", *, most: int = LISTED) -> str:
    """Names as a message tells them: the first few, then how many more there are ("a, b and 3 more")."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return separator.join(found[:most]) + more


def _tree(root: type[EmaError]) -> dict[str, type[EmaError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


#: code on the wire -> class
BY_CODE: dict[str, type[EmaError]] = _tree(EmaError)


def error_from_problem(problem: dict[str, Any], status: int, *, retry_after: float | None = None) -> EmaError:
    """The error that a problem+json body stands for.

    An unknown code (of a newer server) becomes the class of the HTTP status, or ProtocolError.
    """
    detail = str(problem.get("detail") or problem.get("title") or f"HTTP {status}")
    hint = str(problem.get("hint") or "")
    cls = BY_CODE.get(str(problem.get("code")))
    if cls is None or cls.status != status:
        general = (
            BadRequest,
            Unauthorized,
            Forbidden,
            NotFound,
            MethodNotAllowed,
            RequestTimeout,
            Conflict,
            BodyTooLarge,
            Invalid,
            InternalError,
            Overloaded,
        )
        cls = next((c for c in general if c.status == status), ProtocolError)
    return cls(detail, hint=hint, retry_after=retry_after)
