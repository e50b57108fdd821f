"""Hand an artifact to other programs: transformers, llama.cpp, Ollama, a hub."""

from enum import StrEnum


class Destination(StrEnum):
    """Who will read the export."""

    hf = "hf"
    gguf = "gguf"
    ollama = "ollama"
    hub = "hub"


EXPORTING = "export-"
"""How the scratch folder of an export at work begins."""
