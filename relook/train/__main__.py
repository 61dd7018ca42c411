"""`python -m relook.train RECIPE --key value`: what torchrun, accelerate launch and deepspeed start."""

import sys

import torch

from relook.cli import main

sys.argv[1:1] = ["train"]
try:
    main()
except SystemExit as end:
    if not end.code and torch.distributed.is_initialized():  # after an error the others may never come here
        torch.distributed.destroy_process_group()
    raise
