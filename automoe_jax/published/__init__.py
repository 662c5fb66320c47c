"""What HAT and AutoMoE published, read and written: YAML files and fairseq checkpoints.

Takes their files, gives a `Subnet`, a `SearchSpace` or supernet parameters, and back; subnet files
of every format are read here. It may import `model` and everything below it.
"""
