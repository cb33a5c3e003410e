"""``python -m ema_service``: the same as the command ``ema-service``. Knows that command. Does not know anything
else."""

from __future__ import annotations

from ema_service.cli import main

if __name__ == "__main__":
    main()
