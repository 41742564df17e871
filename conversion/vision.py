"""Find the vision encoder of a checkpoint: its configuration, and its weights when they are not inside."""

from __future__ import annotations

from pathlib import Path

from conversion.hf_config import check_preprocessor, vision_from_hf
from conversion.hub import is_hub_name, resolve
from conversion.readers import Tensors, as_vision_tower, open_tensors, read_json
from lmm_jax.config import VisionConfig
from lmm_jax.errors import UserError

BUILT_IN = VisionConfig()  # openai/clip-vit-large-patch14-336: needs no folder when the weights are in the checkpoint


def named_encoder(named: object, folder: Path, weights: bool) -> tuple[VisionConfig, Tensors]:
    """The encoder that a checkpoint's ``mm_vision_tower`` names.

    Args:
      named: its value: a folder relative to the checkpoint, or a hub name.
      folder: the checkpoint.
      weights: False when they are in the checkpoint.

    Returns:
      Its configuration, and its tensors under their names in a whole checkpoint (none without `weights`).

    Raises:
      UserError: there is no such encoder, or it is not one that this project can run.
    """
    if not isinstance(named, str) or not named:
        raise UserError(f"{folder / 'config.json'}: mm_vision_tower is {named!r}; give the encoder's folder with --vision DIR")
    if (folder / named).is_dir():
        return encoder(str(folder / named), weights)
    if not is_hub_name(named):
        raise UserError(
            f"{folder / 'config.json'}: mm_vision_tower is {named!r}, which is neither a folder nor a hub name; "
            "give the encoder's folder with --vision DIR"
        )
    return encoder(named, weights)


def encoder(source: str, weights: bool) -> tuple[VisionConfig, Tensors]:
    """The encoder in a folder or on the hub; arguments, result and errors as in `named_encoder`."""
    is_folder = Path(source).expanduser().is_dir()
    if source == BUILT_IN.name and not weights and not is_folder:
        return BUILT_IN, Tensors()
    folder = resolve(source, weights)
    name = "" if is_folder else source
    config = vision_from_hf(read_json(folder / "config.json"), name, str(folder / "config.json"))
    preprocessor = folder / "preprocessor_config.json"
    if preprocessor.is_file():
        check_preprocessor(read_json(preprocessor), config, str(preprocessor))
    return config, as_vision_tower(open_tensors(folder)) if weights else Tensors()
