"""What CosyVoice2's front end does in another way: prompts cut to whole tokens, and instructions with a prompt."""

from torch import Tensor

from cosyvoice.cli.frontend import CosyVoiceFrontEnd, Prompt, with_length
from cosyvoice.runtime.errors import InputError
from cosyvoice.utils.frames import Rates

END_OF_INSTRUCTION = "<|endofprompt|>"  # a token of its own


class CosyVoice2FrontEnd(CosyVoiceFrontEnd):
    """The front end of models in which each token lasts a whole number of mel frames.

    The flow tells prompt and speech apart by the prompt's mel frames, so a prompt has exactly the frames of its tokens.
    """

    def _flow_prompt(self, prompt_wav: Prompt, resample_rate: int | None) -> dict[str, Tensor]:
        """Return the prompt as CosyVoice-300M has it, with tokens and mel cut to the shorter of the two."""
        inputs = super()._flow_prompt(prompt_wav, resample_rate)
        tokens, token_len, feat, feat_len = cut_to_tokens(
            inputs["flow_prompt_speech_token"], inputs["prompt_speech_feat"], self.rates
        )
        return inputs | {
            "flow_prompt_speech_token": tokens,
            "flow_prompt_speech_token_len": token_len,
            "prompt_speech_feat": feat,
            "prompt_speech_feat_len": feat_len,
        }

    def frontend_instruct2(
        self,
        tts_text: str,
        instruct_text: str,
        prompt_wav: Prompt,
        resample_rate: int | None = None,
        zero_shot_spk_id: str = "",
    ) -> dict[str, Tensor]:
        """Return the voice of a recording or of a stored prompt, with an instruction in place of the prompt's text.

        The language model does not see the prompt's speech, which would outweigh the instruction.
        """
        inputs = self.frontend_cross_lingual(tts_text, prompt_wav, resample_rate, zero_shot_spk_id)
        if END_OF_INSTRUCTION not in instruct_text:
            instruct_text += END_OF_INSTRUCTION
        inputs["prompt_text"], inputs["prompt_text_len"] = self._extract_text_token(instruct_text)
        return inputs


def cut_to_tokens(tokens: Tensor, feat: Tensor, rates: Rates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens (1, N) and mel (1, T, 80) of equal duration, the longer one cut, each with its length (1,).

    Raises InputError if not even one token is left.
    """
    count = min(tokens.shape[1], rates.whole_tokens(feat.shape[1]))
    if count == 0:
        raise InputError("the prompt is shorter than one speech token; give a recording of a few seconds")
    return *with_length(tokens[:, :count]), *with_length(feat[:, : rates.mel_frames(count)])
