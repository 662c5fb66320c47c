"""The commands of `automoe_jax`, one module each.

A command takes flags and a config, calls one phase, and prints progress, tables and one-line
errors. `process` prepares the process (environment, memory allocator) and runs a command by name;
`launch/` calls it. A command may import every other package, and only at its top.
"""
