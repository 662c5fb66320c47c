"""Search algorithms and their bookkeeping: no JAX, no clock, no files.

Takes a `SearchSpace`, scores and costs, gives the next subnets to score, fronts and the order of
final measurements. It may import `architecture` and `system.errors`.
"""
