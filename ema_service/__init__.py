"""The server of the remote EMA shadow-weight service.

The folders are the way of the data: ``api`` receives a push, ``bodies`` parses its stream into ``memory``, ``shadows``
averages the parameters with ``averaging``, ``runs`` decides whether the update counts, ``persistence`` and ``storage``
keep the version. DESIGN.md, here and in the wings, gives the reasons.

Imports nothing, so that the command line answers at once. Knows its parts by name only. Does not know what they do.
"""
