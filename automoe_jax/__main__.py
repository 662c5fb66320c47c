"""`python -m automoe_jax` is the console command `automoe`."""

from automoe_jax.cli.main import main

main()
