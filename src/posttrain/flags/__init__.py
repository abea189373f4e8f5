"""Every flag of our own, grouped by who uses it. A flag, a YAML key and the name in the docs are the same word.

The classes are read by `config.py` (parsing, origins), by `--help` (grouped by the class docstring) and by the docs. The
order of fields is the order of the help. Fields of `transformers.TrainingArguments` are accepted beside them.
"""

from posttrain.flags.commands import (
    AskFlags,
    ConvertFlags,
    GenerateFlags,
    InferenceFlags,
    MergeFlags,
    PipelineFlags,
    SamplingFlags,
    ScoreFlags,
    ShowFlags,
    ShowModelFlags,
    ShowTextFlags,
)
from posttrain.flags.ppo import (
    LoopFlags,
    PpoFlags,
    PromptFlags,
    RewardSourceFlags,
)
from posttrain.flags.training import (
    AdapterFlags,
    ChatFlags,
    DataFlags,
    DpoFlags,
    ModelFlags,
    PackFlags,
    PairFlags,
    PrepareFlags,
    RewardFlags,
    RunFlags,
    SharingFlags,
    TemplateFlags,
    TextFlags,
)

__all__ = [
    "AdapterFlags",
    "AskFlags",
    "ChatFlags",
    "ConvertFlags",
    "DataFlags",
    "DpoFlags",
    "GenerateFlags",
    "InferenceFlags",
    "LoopFlags",
    "MergeFlags",
    "ModelFlags",
    "PackFlags",
    "PairFlags",
    "PipelineFlags",
    "PpoFlags",
    "PrepareFlags",
    "PromptFlags",
    "RewardFlags",
    "RewardSourceFlags",
    "RunFlags",
    "SamplingFlags",
    "ScoreFlags",
    "SharingFlags",
    "ShowFlags",
    "ShowModelFlags",
    "ShowTextFlags",
    "TemplateFlags",
    "TextFlags",
]
