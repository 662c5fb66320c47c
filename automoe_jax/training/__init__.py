"""Training of a supernet or of one subnet, and scoring of many subnets.

Takes token pairs and a `TrainingTarget`, gives Orbax checkpoints, metrics and validation losses.
Steps are functions of one device, mapped in `parallel` alone. It may import `model`, `data` and
everything below them.
"""
