"""A response that an engine has just written, as a rollout."""

from tip_analysis.core.names import FinishReason
from tip_analysis.rollouts.encoded import EncodedPrompt, Rollout
from tip_analysis.rollouts.sampling import Generation


def sampled_rollout(prompt: EncodedPrompt, name: str, generation: Generation) -> Rollout:
    """A response that a student has just written, as a rollout."""
    return Rollout(
        rollout_id=name,
        prompt_id=prompt.id,
        prompt=prompt.token_ids,
        teacher_prompt=prompt.teacher_token_ids,
        response=generation.token_ids,
        logprobs=generation.logprobs,
        truncated=generation.finish_reason == FinishReason.LENGTH,
    )
