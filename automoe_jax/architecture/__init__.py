"""Architectures: `Subnet`, `SearchSpace`, and everything that follows from them alone.

Sampling, mutation and crossover, the traced form of a subnet (`ActiveSubnet`), counts of parameters
and FLOPs, special token ids. It may import `system`.
"""
