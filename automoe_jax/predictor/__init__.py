"""Latency of a subnet predicted from a few dozen timed ones.

Takes a search space and timed subnets, gives a `LatencyModel` (JSON), and the estimate of any
subnet's latency from that model and the measurements of a search. It may import `latency` and
everything below it.
"""
