"""Quantization methods. One public module in this folder is one step of a recipe; the folder is the registry.

A method's module has three names, nothing to inherit and nothing to register:

    Config    frozen dataclass: the method's options and their defaults
    METHOD    methods.core.job.registry.Method(kind, reads, takes, paper): what it is, which tokens it receives, whether it
              can start from quantized layers
    apply(model, scheme, config, tokens, log) -> model
              the same model; a method of kind ptq or qat has replaced every linear layer of its decoder blocks by a
              QuantizedLinear. tokens, int64, is None, (samples, sequence) or, for training, (steps, accumulation, batch,
              sequence); log is a methods.core.job.log.RunLog. A METHOD that says `distills` gets a last argument `teacher`

and, where it needs it,

    check(scheme, config)   raises ValueError for a combination it cannot do, before any job starts
    held(config, samples)   methods.core.job.registry.Held(...): what it keeps in memory, by which a cluster is asked for it
"""
