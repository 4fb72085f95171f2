"""What must be set before torch or bitsandbytes is imported?"""

import logging
import os

# On a CPU bitsandbytes asks at import for an optional package with a faster kernel; NF4 runs without it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# A GPU's memory in segments that grow: what the allocator holds stays near to what tensors take.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
