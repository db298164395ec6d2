"""Logits of the last of three tokens, as mlx-lm loads a folder. Usage: [--float32] MODEL..."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
exact = sys.argv[1:2] == ["--float32"]
for folder in sys.argv[2 if exact else 1 :]:
    model, _ = load_model(Path(folder))
    if exact:
        model.set_dtype(mx.float32)
    logits = model(mx.array([[5, 6, 7]]))[0, -1].astype(mx.float32)
    print(json.dumps({"logits": logits.tolist()}), flush=True)
