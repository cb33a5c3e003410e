"""``ema-service demo``: a server, a trainer and an evaluator, three real processes, at work on real handwritten digits.

    plan.py        what all processes agree on: names, numbers, the lines in which they report
    model.py       the diffusion model: network, noise, loss, sampler
    digits.py      scikit-learn's bundled digits, split into training and held-out images
    trainer.py     process: trains, pushes with RemoteEma, keeps an EMA in process, compares the two at the end
    litema.py      the EMA in process: LitEma's arithmetic in twenty lines
    evaluator.py   process: polls, pulls, measures raw and EMA weights, draws the picture
    picture.py     the picture
    children.py    starting, hearing and ending the processes
    screen.py      the output that the user sees
    play.py        the parent: the order of events and the verdict
    on_ray.py, on_ray_trainer.py       another one, `make cluster-demo`: three hosts under Ray, one of which is killed

The demo starts the server by its command line and speaks to it with the public client, as a user would. The server
imports nothing of the demo; importing the demo imports neither torch nor matplotlib.

Knows the order of its parts. Does not know the server.
"""

from __future__ import annotations

from ema_service.demo.play import run_demo

__all__ = ["run_demo"]
