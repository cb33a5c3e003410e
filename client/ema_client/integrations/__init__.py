"""RemoteEma inside training frameworks: a module for each framework, which imports that framework.

The rule: nothing is imported here, so that no framework is imported for the sake of another. A framework's module turns
events into calls of ``core``, which asks ``origins`` which EMA belongs to a model's weights, ``replica`` for the way of
the weights, and ``kept`` which snapshots stay; ``options`` are what all callbacks take. ``diffusers``, whose pipelines
have no events, writes a run's weights into a pipeline.
"""

from __future__ import annotations
