"""A real Slurm cluster on one machine, to try the launcher and to test it: slurmctld, slurmdbd with MariaDB, and a
slurmd on every one of several hosts, which are namespaces. Nothing exists outside them but one folder."""
