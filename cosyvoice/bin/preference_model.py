"""Training that makes recorded speech likelier than speech that the model itself made (`train.py --dpo`)."""

from typing import Any

import torch
from torch import Tensor, nn

from cosyvoice.bin.recipe_models import SpeechModel
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.losses import DPOLoss

DPO_CONF = {"beta": 0.01}  # as CosyVoice2 was trained; see DPOLoss for the others


class PreferenceModel(SpeechModel):
    """Trains the llm by its own loss on the recorded speech, plus `DPOLoss` against a frozen reference.

    The four log-probabilities of a clip belong to one draw of its layout: policy and reference, recorded and rejected
    speech are comparable only if text and speech take turns alike.
    """

    def __init__(self, part: nn.Module, reference: nn.Module, train_conf: dict[str, Any], seed: int) -> None:
        """reference: an llm like `part`, with its weights. train_conf: `dpo_conf` may hold arguments of DPOLoss.

        Raises InputError if the llm cannot judge rejected speech, or for a setting that is not known.
        """
        super().__init__(part, train_conf, seed)
        if not hasattr(part, "forward_dpo"):
            kind = type(part).__name__
            raise InputError(f"{kind} does not learn preferences. Give the configuration of a CosyVoice2 with --config")
        self.frozen = [reference.eval().requires_grad_(False)]  # in a list, so that checkpoints leave it out
        try:
            self.preference = DPOLoss(**(DPO_CONF | train_conf.get("dpo_conf", {})))
        except TypeError as error:
            raise InputError(f"train_conf: dpo_conf: {error}. Give arguments of DPOLoss") from None

    def on_fit_start(self) -> None:
        self.frozen[0].to(self.device)

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return `loss`, its two sides `sft_loss` and `dpo_loss`, `acc`, and means of the rewards.

        A reward is beta times how much likelier the speech has become than the reference finds it. `reward_margin` is
        that of recorded less that of rejected speech, `dpo_acc` the share of clips in which it is above 0.
        """
        batch = batch | {"bistream": self.part.drawn_layouts(batch)}
        policy = self.part.forward_dpo(batch, self.device)
        with torch.no_grad():
            reference = self.frozen[0].forward_dpo(batch, self.device)
        dpo_loss, chosen, rejected = self.preference(
            policy["chosen_logps"],
            policy["rejected_logps"],
            reference["chosen_logps"],
            reference["rejected_logps"],
        )
        return {
            "loss": policy["loss"] + dpo_loss,
            "acc": policy["acc"],
            "sft_loss": policy["loss"],
            "dpo_loss": dpo_loss,
            "dpo_acc": (chosen > rejected).float().mean(),
            "chosen_reward": chosen.mean(),
            "reject_reward": rejected.mean(),
            "reward_margin": (chosen - rejected).mean(),
        }
