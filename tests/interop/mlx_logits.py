"""Logits of the last of three tokens, as mlx-lm loads a folder. Usage: MODEL..."""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

mx.set_default_device(mx.cpu)
for folder in sys.argv[1:]:
    model, _ = load_model(Path(folder))
    logits = model(mx.array([[5, 6, 7]]))[0, -1].astype(mx.float32)
    print(json.dumps({"logits": logits.tolist()}), flush=True)
