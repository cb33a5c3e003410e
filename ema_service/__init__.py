"""The server of the remote EMA shadow-weight service.

The folders are the way of the data: ``api`` receives a push, ``bodies`` parses it into ``memory``, ``shadows`` averages
it with ``averaging``, ``runs`` decides whether it counts, ``persistence`` and ``storage`` keep the version. DESIGN.md
in each folder gives reasons.

Imports nothing, so that the command line answers at once. Knows its parts by name only. Does not know what they do.
"""
