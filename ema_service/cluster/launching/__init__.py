"""Launching: a cluster's programs, started and kept running, on one machine, on named ones, or where Ray places them.

Knows command lines, processes, and Ray in one file. Does not know what the programs say to each other.
"""
