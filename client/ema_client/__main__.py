"""``python -m ema_client``: the command ``ema``. Knows where the command is defined, and nothing else."""

from __future__ import annotations

from ema_client.cli import main

if __name__ == "__main__":
    main()
