"""Imported before torch and transformers: what they read on the way in. No hub, no advice on optional kernels.

They take seconds to import; a stage whose DVC is killed meanwhile ends then, not after.
"""

import logging
import os

from stages.refusal import die_with_dvc

die_with_dvc()
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a stage reads folders; what must be fetched, download fetched
os.environ["USE_TORCH_XLA"] = "0"  # where it is installed, accelerate would move everything there: stages/models/xla.py
# peft imports bitsandbytes, which tells every CPU of a package for 4-bit products
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
