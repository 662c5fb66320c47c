"""Translation with an exported subnet.

Writes exports (`export`), loads and runs them (`Translator`), and scores translations. Beam search
is one compiled program over one of two engines: XLA's operations, or the native kernels. It may
import `model`, `data` and everything below them, but no training code.
"""
