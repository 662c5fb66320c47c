"""Text to token ids and back: SentencePiece, fairseq's BPE, and plain ids.

Each kind is a module; `loading` reads a tokenizer's folder whatever its kind.
"""
