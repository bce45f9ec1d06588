"""What runs on the nodes: one module a kind of job, started by submitit on every rank."""
