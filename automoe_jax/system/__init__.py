"""The base of every package: errors, files, workdirs, progress, the machine.

It may import nothing of the project.
"""
