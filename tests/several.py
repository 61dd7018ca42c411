"""Run by torchrun: carries out recipes, given as a JSON list of key mappings, one after the other."""

import json
import sys

from relook.recipe import build_recipe
from relook.train.run import train

for keys in json.loads(sys.argv[1]):
    train(build_recipe(keys))
