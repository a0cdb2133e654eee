"""Imported before torch and transformers: what they read on the way in. No hub, no advice on optional kernels."""

import logging
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a stage reads folders; what must be fetched, download fetched
# peft imports bitsandbytes, which tells every CPU of a package for 4-bit products
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
