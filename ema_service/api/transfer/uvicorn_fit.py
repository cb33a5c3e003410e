"""The check that uvicorn still has what LendingProtocol builds on.

Knows the names in uvicorn's sources that LendingProtocol relies on. Does not know what LendingProtocol does with them.
"""

from __future__ import annotations

import inspect

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

__all__ = ["uvicorn_fits"]


def uvicorn_fits() -> bool:
    """Whether the installed uvicorn has every name that LendingProtocol relies on; if not, bodies take the slow
    path."""
    needed = {
        HttpToolsProtocol: (
            *("connection_made", "connection_lost", "data_received", "pause_writing", "resume_writing"),
            *("on_message_begin", "on_header", "on_headers_complete", "on_body", "on_message_complete"),
            *("on_response_complete", "send_400_response", "timeout_keep_alive_handler"),
        ),
        RequestResponseCycle: ("receive",),
        FlowControl: ("resume_reading",),
    }
    attributes = (
        *("self.parser", "self.flow", "self.transport", "self.cycle", "self.scope", "self.pipeline"),
        *("self.url", "self.app_state", "self.loop"),
    )
    source = inspect.getsource(HttpToolsProtocol)
    cycle = inspect.getsource(RequestResponseCycle)
    return (
        all(hasattr(cls, name) for cls, names in needed.items() for name in names)
        and all(name in source for name in attributes)
        and all(name in cycle for name in ("self.waiting_for_100_continue", "self.body", "self.more_body"))
        and "self.expected_content_length" in cycle
        and all(name in cycle for name in ("self.disconnected", "self.response_started", "self.response_complete"))
    )
