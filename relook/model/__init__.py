"""Models: on disk, in memory, and which of their parameters train.

checkpoint      `ModelFolder`: what a path holds, parsed once; tensor files, read lazily; names and configs of formats
lazy_model      `LazyModel`: a model folder of any format in transformers' terms, with its tensors still on disk
adapters        trained changes to a base model, applied tensor by tensor
lora            settings and weight deltas of peft's LoRA adapters
config_checks   checks of configs, generation settings and processors
families        the model families, and what differs between them
load            `load_model`: a model in memory, strictly checked
export          `relook convert`, `merge`, `export`
tokenizer       tokenizers that match the original programs
modeling_relook, post_decoder    the transformers classes; these two files are saved with every model
inspect         `relook inspect`: module tree, trainable parameters, traced tensors
trainable       which parameters train, and the optimizer's groups
"""
