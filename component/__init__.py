import logging

# On a CPU bitsandbytes asks at import for an optional package with a faster kernel; NF4 runs without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
