"""Process: the EMA server a user writes first. The whole body in one piece, safetensors, ``lerp_`` tensor by tensor.

Knows FastAPI and safetensors. Does not know our server.
"""

from __future__ import annotations

import torch
from fastapi import FastAPI, Request
from safetensors.torch import load
from serving import serve

DECAY = 0.9999

app = FastAPI()
shadow: dict[str, torch.Tensor] = {}


@app.put("/push")
async def push(request: Request) -> dict[str, int]:
    """The first push makes the shadow, each later one is averaged into it."""
    parameters = load(await request.body())
    for name, parameter in parameters.items():
        if name in shadow:
            shadow[name].lerp_(parameter, 1 - DECAY)
        else:
            shadow[name] = parameter.clone()
    return {"tensors": len(parameters)}


if __name__ == "__main__":
    serve(app)
