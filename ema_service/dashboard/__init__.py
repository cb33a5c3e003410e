"""The pages for a browser: all runs at ``/``, one run at ``/runs/{run}``, the API's documentation at ``/docs``; at a
gateway the same of whole runs, and the hosts at ``/hosts`` in place of the documentation.

The pages of runs only read: they ask the API every two seconds, as anyone else may, and have no route, no state and no
right of their own. No page loads anything from other hosts; their Content-Security-Policy makes the browser enforce it.

``static/`` has one script for each concern, without a build step:
 - ``list.js``, ``run.js`` and ``hosts.js`` begin the pages;
 - ``frame.js`` follows the service and signs in, ``api.js`` asks;
 - ``health.js`` works out what is wrong with a run, and what to do;
 - ``panels.js``, ``curves.js``, ``ring.js`` show; ``charts.js`` draws, by uPlot (``vendor/``);
 - ``profile.js``, ``rate.js``, ``words.js``, ``dom.js`` are what these need.

Knows its files and the headers they are served with. Does not know runs or weights.
"""

from __future__ import annotations

from fastapi import FastAPI

from ema_service.dashboard.docs import mount_docs
from ema_service.dashboard.page import hosts_router, mount_assets, router

__all__ = ["install", "install_at_gateway"]


def install(app: FastAPI) -> None:
    """Add the pages and their files to ``app``."""
    app.include_router(router)
    mount_docs(app)
    mount_assets(app)


def install_at_gateway(app: FastAPI) -> None:
    """Add the pages of a gateway, and their files, to ``app``."""
    app.include_router(router)
    app.include_router(hosts_router)
    mount_assets(app)
