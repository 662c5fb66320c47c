"""Reads and writes the files of HAT and AutoMoE: YAML and fairseq checkpoints.

Converts them to a `Subnet`, a `SearchSpace` or supernet parameters, and back; `subnet_files` reads
subnet files of every format. It may import `model` and everything below it.
"""
