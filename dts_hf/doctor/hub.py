"""Whether the upload at the end of a run would be taken: the login, looked at before hours are spent."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainingArguments

from dts_hf.doctor.diagnosis import Check
from dts_hf.errors import UserError
from dts_hf.hub.push import Destination, check_login
from dts_hf.recipe.schema import Recipe


def check_hub(check: Check, recipe: Recipe, args: TrainingArguments) -> None:
    """Ask the Hub whose login this is. Nothing is made there.

    Args:
        check: takes what is found.
        recipe: names the run, whose repository is called like it.
        args: name the repository, and say how private it is.
    """
    from huggingface_hub import is_offline_mode

    private = args.hub_private_repo is not False
    to = Destination(args.hub_model_id or Path(recipe.output.dir).resolve().name, private, token=args.hub_token)
    kind = "private" if private else "PUBLIC"
    if is_offline_mode():
        check.warn(
            "hub-not-checked",
            "training.push_to_hub is true and this machine is offline (HF_HUB_OFFLINE): the login could not be checked, "
            "and a run here would be refused",
            "Unset HF_HUB_OFFLINE, or train without push_to_hub and upload elsewhere: dts-hf push",
        )
        return
    try:
        name = check_login(to)
    except UserError as error:
        check.error("hub-login", str(error))
        return
    check.summary = f"{to.repository}, {kind}, with the login of {name}"
