"""RemoteEma inside training frameworks: a module for each framework, which imports that framework.

The rule: nothing is imported here, so that no framework is imported for the sake of another. What all frameworks need
of a process of a training is in ``replica``.
"""

from __future__ import annotations
