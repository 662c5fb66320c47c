"""The Transformer, as a supernet and as a stand-alone model.

Takes token ids (and, in a supernet, an `ActiveSubnet`), gives logits, hidden states and router
outputs. The weights of a subnet are cut out by `extract`. It may import `ops`, `architecture` and
`system`.
"""
