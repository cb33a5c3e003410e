"""Runs that lie on several hosts: large weights go between this process and each host, past the gateway.

Knows which host has which rows, and how a version of all of them is read. Does not know how one host is spoken to
(http), or who decides which updates count.
"""
