"""The ids that transformers makes of "ab". Usage: FOLDER..."""

import json
import sys

from transformers import AutoTokenizer

found = [AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] for folder in sys.argv[1:]]
print(json.dumps(found))
