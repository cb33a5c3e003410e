"""What FastAPI accepts as a body is what the protocol says: the same fields, required or not, the same defaults.

Knows both descriptions. Does not know what a server does with a body.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from pydantic import BaseModel

from ema_client import protocol
from ema_service.api.app import create_app
from ema_service.api.schemas import AverageConfigBody, RewindBody, RunConfigBody, RunPatchBody, SweepBody
from ema_service.settings import Settings


def required(kind: type[Any]) -> set[str]:
    fields = dataclasses.fields(kind)
    missing = dataclasses.MISSING
    return {f.name for f in fields if f.default is missing and f.default_factory is missing}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (RunConfigBody, protocol.RunConfig),
        (AverageConfigBody, protocol.AverageConfig),
        (RunPatchBody, protocol.RunPatch),
        (RewindBody, protocol.Rewind),
        (SweepBody, protocol.SweepReport),
    ],
    ids=["config", "average", "patch", "rewind", "sweep"],
)
def test_fields_are_the_protocols(body: type[BaseModel], kind: type[Any]) -> None:
    """A field that only one side knows would be refused as unknown, or never sent."""
    assert set(body.model_fields) == {field.name for field in dataclasses.fields(kind)}
    assert {name for name, field in body.model_fields.items() if field.is_required()} == required(kind)


def test_a_config_survives_the_way() -> None:
    """Defaults, and every field with another value, come out of the check as they were sent."""
    tensor = protocol.TensorSpec("w", (2, 3), "F32")
    average = protocol.AverageConfig("fast", "constant", 0.5)
    configs = [
        protocol.RunConfig("r", (tensor,)),
        protocol.RunConfig(
            "r", (tensor,), 0.5, False, "step", (average, protocol.AverageConfig()), "allow", "memory", ("w",)
        ),
    ]
    for config in configs:
        body = RunConfigBody.model_validate_json(json.dumps(protocol.to_json(config)))
        assert body.to_config() == config


def test_a_report_survives_the_way() -> None:
    """As a configuration does; and what the server keeps is read as the same report."""
    points = (protocol.SweepPoint(0.5, None, "no"), protocol.SweepPoint(0.9, 1.5))
    for report in (
        protocol.SweepReport("decay", points),
        protocol.SweepReport("decay", points, "epoch-1", True, "FID"),
        protocol.SweepReport("half_life", points, 7),
    ):
        sent = protocol.to_json(report)
        assert SweepBody.model_validate_json(json.dumps(sent)).to_report() == report
        assert protocol.from_json(protocol.SweepReport, json.loads(json.dumps(sent))) == report


def test_each_json_body_has_a_limit() -> None:
    """A route with a JSON body says how long that may be: a route that does not say so takes none."""
    paths = create_app(Settings(data_dir=None)).openapi()["paths"]
    operations = [operation for path in paths.values() for operation in path.values()]
    bodies = [operation["requestBody"] for operation in operations if "requestBody" in operation]
    taken = [body for body in bodies if "application/json" in body["content"]]

    assert len(taken) >= 3
    assert [body for body in taken if not body.get("x-max-bytes")] == []
    assert [body for body in bodies if body not in taken and "x-max-bytes" in body] == []
