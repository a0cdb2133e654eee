"""Two TPU cores that XLA makes of the CPU."""

import os

os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"}

import torch
import torch_xla

torch_xla.runtime.use_spmd()
# at the first way back, otherwise a plain run's, torch counts the devices for good
torch.zeros(1, requires_grad=True).to("xla").sum().backward()
