"""The commands of `automoe_jax`, one module each.

A command takes flags and a config, prepares the process (environment, memory allocator), calls one
phase, and prints progress, tables and one-line errors. Nothing imports it but `launch/`; it may
import every other package.
"""
