"""The supernet and the stand-alone Transformer of a subnet.

Takes token ids (and, in a supernet, an `ActiveSubnet`), returns logits, hidden states and router
outputs; `extract` takes a subnet's weights from a supernet. It may import `ops`, `architecture` and
`system`.
"""
