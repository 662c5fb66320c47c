"""A run and its phases, one file each: prepare, train, search, rank, export, convert, report.

A phase takes a `Run` (config, folder, progress), reads the files that earlier phases wrote and
writes its own folder. It may import every package but `cli`, and it is where they meet: what one
package decides and another measures is combined here.
"""
