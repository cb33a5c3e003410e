"""The gateway: a server of whole runs to whoever asks, whose runs are the shards of the cluster's hosts.

Knows the routes of a server, and which of the hosts has which bytes. Keeps nothing. Does not know who decides, or how
weights are averaged.
"""
