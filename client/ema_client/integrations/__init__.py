"""RemoteEma inside training frameworks: one module for each, which imports that framework.

Knows nothing itself, so that no framework is imported for the sake of another.
"""

from __future__ import annotations
