"""JSON that asks for runs and changes nobody can have.

Knows the fields of a RunConfig. Does not know how it is sent.
"""

from __future__ import annotations

import json
from typing import Any

from tests.fuzz.attacks.forge import json_attack


def config(**changes: Any) -> dict[str, Any]:
    layout = [{"name": "w", "shape": [3], "dtype": "F32"}]
    return {"run": "attacker", "layout": layout, **changes}


def tensor(**changes: Any) -> dict[str, Any]:
    return config(layout=[{"name": "w", "shape": [3], "dtype": "F32", **changes}])


BAD_DECAYS = {"-0.1": -0.1, "1.1": 1.1, "NaN": float("nan"), "Infinity": float("inf"), "text": "0.9", "true": True}

CONFIGS = [
    *(json_attack(f"create with decay {name}", "decay", config(decay=value)) for name, value in BAD_DECAYS.items()),
    json_attack("create with decay null", "decay", config(decay=None)),
    *(
        json_attack(f"patch with decay {name}", "decay", {"decay": value}, "PATCH", "/v1/runs/{run}")
        for name, value in {**BAD_DECAYS, "null": None}.items()
    ),
    json_attack("an average with decay 2", "averages.0.decay", config(averages=[{"name": "a", "decay": 2}])),
    json_attack("patch nothing", "decay", {}, "PATCH", "/v1/runs/{run}"),
    json_attack("patch something unknown", "num_updates", {"decay": 0.5, "num_updates": 0}, "PATCH", "/v1/runs/{run}"),
    json_attack("patch an average named ..", "average", {"decay": 0.5, "average": ".."}, "PATCH", "/v1/runs/{run}"),
    json_attack("two averages of one name", "'a'", config(averages=[{"name": "a"}, {"name": "a", "decay": 0.5}])),
    json_attack("no average", "averages", config(averages=[])),
    json_attack("17 averages", "averages", config(averages=[{"name": f"a{i}"} for i in range(17)])),
    json_attack("an average named ../ema", "averages.0.name", config(averages=[{"name": "../ema"}])),
    json_attack("an unknown schedule", "schedule", config(averages=[{"name": "a", "schedule": "magic"}])),
    json_attack("no layout", "layout", {"run": "attacker"}),
    json_attack("no tensors", "layout", config(layout=[])),
    json_attack("a layout that is an object", "layout", config(layout={"w": [3]})),
    json_attack("two tensors of one name", "'w'", config(layout=tensor()["layout"] * 2)),
    json_attack("a tensor of integers", "I64", tensor(dtype="I64")),
    json_attack("a dtype in torch's words", "float32", tensor(dtype="float32")),
    json_attack("half a surrogate pair for a dtype", "hex escape", tensor(dtype="\ud800")),
    json_attack("a tensor of a negative size", "shape", tensor(shape=[-1])),
    json_attack("a tensor of size true", "shape", tensor(shape=[True])),
    json_attack("a tensor of size 3.5", "shape", tensor(shape=[3.5])),
    json_attack("a tensor of size '3'", "shape", tensor(shape=["3"])),
    json_attack("a tensor of size 2**63", "shape", tensor(shape=[2**63])),
    json_attack("a tensor of 2**65 bytes", "2**63 bytes", tensor(shape=[2**32, 2**31])),
    json_attack("a tensor of 33 dimensions", "shape", tensor(shape=[1] * 33)),
    json_attack("a tensor without a name", "name", tensor(name="")),
    json_attack("a tensor named in 1,025 characters", "name", tensor(name="n" * 1025)),
    json_attack("a tensor named __metadata__", "__metadata__", tensor(name="__metadata__")),
    json_attack("a tensor named by half a surrogate pair", "hex escape", tensor(name="\ud800")),
    json_attack("a field nobody knows", "color", config(color="red")),
    json_attack("a field named by half a surrogate pair", "", config(**{"\ud800": 1})),
    json_attack("a tensor's field nobody knows", "stride", tensor(stride=[1])),
    json_attack("decay_per epoch", "decay_per", config(decay_per="epoch")),
    json_attack("durability eternal", "durability", config(durability="eternal")),
    json_attack("use_num_updates 1", "use_num_updates", config(use_num_updates=1)),
    *(
        json_attack(f"create a run named {name[:20]!r}", "run", config(run=name))
        for name in [
            "..",
            "a/b",
            "",
            "n" * 129,
            "café",
            "a\n",
            "a\0",
            ".a",
            "a\\b",
            " a",
            "a ",
            "\u202ea",
            "\uff0e\uff0e",
        ]
    ),
    json_attack("a run named by half a surrogate pair", "hex escape", config(run="\ud800")),
    json_attack("a run that is a number", "run", config(run=5)),
    json_attack("a config that is a list", "", [config()]),
    json_attack("a config that is null", "", b"null"),
    json_attack("a config that is cut", "", json.dumps(config()).encode()[:-1]),
    json_attack("a config that is not UTF-8", "", b'{"run": "\xff"}'),
    json_attack("a config nested 100,000 deep", "", b"[" * 100_000),
    json_attack("a layout nested 100,000 deep", "", b'{"layout": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    json_attack(
        "a tensor of a size of 5,000 digits",
        "",
        json.dumps(config()).encode().replace(b"[3]", b"[" + b"9" * 5000 + b"]"),
    ),
    json_attack("a config nested 300 deep", "recursion", b'{"run": ' + b"[" * 300 + b"]" * 300 + b"}"),
    json_attack(
        "a config of a million empty objects", "layout", b'{"run": "a", "layout": [' + b"{}," * 999_999 + b"{}]}"
    ),
    json_attack("a number of a million digits", "out of range", b'{"run": "a", "decay": ' + b"9" * 1_000_000 + b"}"),
    json_attack("a field twice, of two kinds", "decay", b'{"run": "a", "layout": [], "decay": 0.5, "decay": "x"}'),
    json_attack("no config", "", b""),
]
