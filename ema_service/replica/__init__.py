"""A replica: follows the runs of another server, its original, and is read in the original's place.

Knows the original's routes, and runs. Does not know who reads, or how a version is sent.
"""
