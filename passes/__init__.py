"""The passes that graphq brings along: name in recipes -> "module:Class", imported when a recipe asks for it."""

CATALOG = {
    "normalize": "graphq.passes.normalize:Normalize",
    "tune": "graphq.passes.tune:Tune",
    "insert-qdq": "graphq.passes.insert_qdq:InsertQdq",
    "quantize-weights": "graphq.passes.quantize_weights:QuantizeWeights",
    "equalize": "graphq.passes.equalize:Equalize",
    "migrate": "graphq.passes.migrate:Migrate",
    "mixed-precision": "graphq.passes.mixed_precision:MixedPrecision",
    "bias-correct": "graphq.passes.bias_correct:BiasCorrect",
    "aqer": "graphq.passes.aqer:Aqer",
    "round": "graphq.passes.round:Round",
    "ln-reparam": "graphq.passes.ln_reparam:LnReparam",
    "sulq-softmax": "graphq.passes.sulq_softmax:SulqSoftmax",
    "dynamic-activations": "graphq.passes.dynamic_activations:DynamicActivations",
    "cross-scale": "graphq.passes.cross_scale:CrossScale",
    "noisy-bias": "graphq.passes.noisy_bias:NoisyBias",
    "block-float": "graphq.passes.block_float:BlockFloat",
    "lower": "graphq.passes.lower:Lower",
    "digit-planes": "graphq.passes.digit_planes:DigitPlanes",
    "prune": "graphq.passes.prune:Prune",
    "cast-float": "graphq.passes.cast_float:CastFloat",
}
