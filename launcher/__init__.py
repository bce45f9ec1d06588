"""The launcher: a YAML of nodes, TP and EP becomes a job, and the job a report. Imports no torch."""
