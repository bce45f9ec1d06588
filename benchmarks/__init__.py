"""What it costs, measured: each module is a command."""
