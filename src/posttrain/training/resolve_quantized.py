"""Flags of a quantised base: what they imply, what contradicts them, and the optimizers of bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging

from posttrain.config import Config
from posttrain.model.quantize import quantization_of
from posttrain.types import UserError

logger = logging.getLogger(__name__)

# Paged optimizers move their state out of a GPU's memory when it is short; on a CPU there is nowhere to move it. The same without.
UNPAGED = {
    "paged_adamw": "adamw_torch",
    "paged_adamw_32bit": "adamw_torch",
    "paged_adamw_8bit": "adamw_bnb_8bit",
    "paged_ademamix_32bit": "ademamix",
    "paged_ademamix_8bit": "ademamix_8bit",
    "paged_lion": "lion_32bit",
    "paged_lion_32bit": "lion_32bit",
    "paged_lion_8bit": "lion_8bit",
}
OF_BITSANDBYTES = {"adamw_8bit", "adamw_bnb_8bit", "ademamix", "ademamix_8bit", "lion_32bit", "lion_8bit", "rmsprop_bnb",
                   "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", *UNPAGED}  # fmt: skip


def resolve_quantized(config: Config) -> Config:
    """The config with what --qlora implies. Raises UserError for bits that contradict each other, or weights that cannot be trained."""
    if config["qlora"]:
        if config["load_in_8bit"]:
            raise UserError("--qlora True loads the base in 4 bits, --load_in_8bit True in 8: give one")
        if not config["load_in_4bit"]:
            if config.given("load_in_4bit"):
                raise UserError("--qlora True loads the base in 4 bits, which --load_in_4bit False forbids: give one")
            logger.info("--qlora True: implies --load_in_4bit True, NF4 with its scales in 8 bits")
            config = config.replace("load_in_4bit", True)
    how = quantization_of(config["load_in_4bit"], config["load_in_8bit"], double=config["qlora"])
    if how is not None and not config["use_peft"]:
        raise UserError(
            f"--load_in_{how[:4]} True: quantised weights cannot be trained; --use_peft True trains an adapter on them"
        )
    return config


def resolve_optimizer(config: Config, on_cpu: bool) -> Config:
    """On a CPU an optimizer without pages, with a line that says so. Raises UserError where its package is missing."""
    wanted = config["optim"]
    if on_cpu and wanted in UNPAGED:
        logger.info("--optim %s: pages are for a GPU's memory; on this CPU it is %s, the same update", wanted, UNPAGED[wanted])
        config = config.replace("optim", UNPAGED[wanted])
    if config["optim"] in OF_BITSANDBYTES and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--optim {wanted} needs bitsandbytes; run: pip install 'posttrain[quant]'")
    return config
