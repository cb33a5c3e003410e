"""A training in a batch job, with a LitEma of its own to compare with: argv: run, folder for signs, updates.

Halfway it makes the file `halfway`, goes on once there is `go`, and waits then until its next update is applied,
however long the service is away. Ends with 0 where the service's EMA is LitEma's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from ema_client import RemoteEma

run, folder, updates = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
model = torch.nn.Linear(16, 16)
shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
with RemoteEma(model, 0.99, run=run, durability="disk", resume="auto") as ema:
    for n in range(1, updates + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ema(model)
        one_minus_decay = 1.0 - min(torch.tensor(0.99), (1 + torch.tensor(n)) / (10 + torch.tensor(n)))
        for name, parameter in model.named_parameters():
            shadow[name].sub_(one_minus_decay * (shadow[name] - parameter.detach()))
        if n == updates // 2 + 1:
            while ema.pending:
                time.sleep(0.02)
        if n == updates // 2:
            ema.flush()
            (folder / "halfway").touch()
            while not (folder / "go").exists():
                time.sleep(0.02)
    ema.copy_to(model)
same = all(torch.equal(parameter, shadow[name]) for name, parameter in model.named_parameters())
sys.stdout.write(f"{updates} updates, {'the same as' if same else 'other than'} LitEma's: {ema.stats}\n")
sys.exit(not same)
