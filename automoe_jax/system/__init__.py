"""What every package stands on: errors, files, workdirs, progress, the machine.

It may import nothing of the project.
"""
