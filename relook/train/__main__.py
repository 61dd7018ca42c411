"""`python -m relook.train RECIPE --key value`: what torchrun, accelerate launch and deepspeed start."""

import sys

from relook.cli import main

sys.argv[1:1] = ["train"]
main()
