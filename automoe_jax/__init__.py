"""automoe_jax: train, search and ship mixture-of-experts translation models under a budget."""

__version__ = "0.1.0"
