"""Operators with hand-written backward passes or platform-specific code.

Arrays in, arrays out: the grouped expert FFN, the chunked cross-entropy, products that skip
inactive widths. It may import `architecture`.
"""
