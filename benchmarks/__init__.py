"""What the README claims, measured: each module is a command, `python -m benchmarks.speed step`."""
