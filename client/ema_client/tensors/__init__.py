"""Tensors and the bytes of a body: sent from the tensors' own memory, received into it, named without wrappers.

The rule: everything here is torch, state dicts and safetensors streams; HTTP is used for the class of a body alone.
Does not know routes, runs, or when something is sent.
"""

from __future__ import annotations
