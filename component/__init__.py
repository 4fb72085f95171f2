"""Which environment settings must precede the import of torch and bitsandbytes?"""

import logging
import os

# On import, bitsandbytes suggests an optional package with a faster CPU kernel; NF4 works without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# Less fragmentation: reserved GPU memory stays close to allocated memory.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
