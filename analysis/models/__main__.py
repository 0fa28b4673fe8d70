"""The models that can be evaluated: python -m analysis.models"""

import argparse

import pandas as pd

from analysis.models import KNOWN, MODELS

argparse.ArgumentParser(
    prog="python -m analysis.models",
    description="List the models that can be evaluated: what they are, what they need, how to get them. "
    "Everything that takes a model takes a name of this list, a Hugging Face name, or a folder in Hugging Face form.",
).parse_args()
print("Embedded, ready to use:", ", ".join(MODELS), "\n")
print(
    pd.DataFrame(
        [
            {
                "model": name,
                "parameters (billions)": known.parameters,
                "visual tokens": known.tokens,
                "weights in 16 bits (GB)": f"{known.memory:.0f}",
                "download (GB)": known.download or "see --help",
                "licence": known.licence,
                "gated": "yes" if known.gated else "no",
                "get it with": known.convert or f"hf download {name}",
            }
            for name, known in KNOWN.items()
        ]
    ).to_string(index=False)
)
