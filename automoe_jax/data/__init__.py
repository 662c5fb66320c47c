"""Parallel text: corpora, tokenizers, token files, and the plan of batches.

Takes text files, TFDS corpora or generated phrases, gives token pairs by index and padded batches
for this process's devices. It may import `architecture.ids` and `system`.
"""
