"""Latency of exported subnets, measured.

Takes exports or a function that writes them, times them in a child process, in turns and corrected
for drift, and gives means, intervals and records (JSON lines). It may import `decoding` and
everything below it.
"""
