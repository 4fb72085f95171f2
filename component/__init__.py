"""Which environment settings must precede the import of torch and bitsandbytes?"""

import logging
import os
import sys

# On import, bitsandbytes suggests an optional package with a faster CPU kernel; NF4 works without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# In a log, a progress bar is printed at its start and again at its end; ours ask tqdm the same (disable=None).
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# Less fragmentation: reserved GPU memory stays close to allocated memory.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
