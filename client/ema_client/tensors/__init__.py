"""Tensors and the bytes of a body: sent from the memory tensors lie in, received into it, named without wrappers.

Knows torch, state dicts and safetensors streams. Does not know routes, runs, or when something is sent.
"""

from __future__ import annotations
