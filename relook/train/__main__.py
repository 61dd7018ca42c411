"""`python -m relook.train RECIPE --key value`: what torchrun, accelerate launch and deepspeed start."""

import sys

import torch

from relook.cli import main

sys.argv[1:1] = ["train"]
main()
if torch.distributed.is_initialized():  # not after an error, when the others may never come here
    torch.distributed.destroy_process_group()
