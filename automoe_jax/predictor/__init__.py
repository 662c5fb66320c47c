"""Latency of a subnet predicted from a few dozen timed ones."""
