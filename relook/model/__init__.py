"""Models: on disk, in memory, and what trains in them.

checkpoint      named tensors in files, read one at a time, written in shards
formats         what a folder is, how its tensors are called, how its config reads in transformers
source          a model folder of any format in transformers' terms
changes         what was trained on a base, laid on it tensor by tensor
trunks          the families of models, and what differs between them
load            `load_model`: all of it in memory, checked
convert         `relook convert`, `merge`, `export`
tokenizer       tokenizers as the original programs read them
modeling_relook, post_decoder    the transformers classes; these two files travel with every saved model
inspect         `relook inspect`: module tree, what trains, the tensors on their way
regimes         which parameters train
sharded         parameters that lie in parts over several processes, read and written whole
"""
