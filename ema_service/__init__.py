"""The server of the remote EMA shadow-weight service.

The way of the data is the layout of the package: ``api`` receives it, ``runs`` stages it and decides what becomes
of it, ``averaging`` computes, ``storage`` keeps. DESIGN.md beside this file gives the reasons. The package itself
imports nothing, so that the command line answers at once; it knows its parts by name only, not what they do.
"""
