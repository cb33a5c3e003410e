"""The routes of a gateway, by what they are of: each module has a class whose ``routes`` are its answers.

Knows which host is asked what. Does not know how hosts are reached (hosts), or who decides.
"""
