"""Training across narrow links: the worker floor, and the command `isthmus`.

What is public, for use from Python; all else may change without notice:

- `node.config.load_config`, `node.config.Config`: settings, from TOML files, presets and words of a command line
- `node.data.open_data`, `node.data.make_tokenizer`: corpora and tokenizers
- `node.model.llama.Llama`: the plain model, named as transformers names it
- `node.subspace.codec.Codec`, `node.subspace.rotation.make_rotation`: compression of keys and values, alone
- `node.lab.in_process.train_in_process`: several nodes in one process, without a network
- `node.cli.main`: a command of `isthmus`, given as a list of words

`examples/` uses them. The job is in `config`, `worker`, `model`, `subspace`, `exchange`, `train`, `data` and `export`;
`commands` is what `isthmus` does, `measure` what a node measures of itself, `watch` what a person sees of a run, and
`lab` asks questions about runs. Reading order: `train.trainer`, `model.exchanged`, `exchange.chunks`, `subspace.codec`.
Importing this package imports no torch.
"""
