"""Print, as JSON, what mlx takes of how a layer is quantized."""

import inspect
import json

import mlx.nn as nn

kinds = (nn.Linear.to_quantized, nn.Embedding.to_quantized, nn.quantize)
named = {each for kind in kinds for each in inspect.signature(kind).parameters}
print(json.dumps(sorted(named - {"self", "model", "class_predicate"})))
