"""Small samples for the tests of this room."""

from rl.messages import RolloutRequest, Sample, TokenColumns


def make_sample(
    prompt_ids: list[int], sampled: list[int], logprobs: list[float], text: str = "", **request: object
) -> Sample:
    fields = {
        "prompt_index": 0,
        "sample_index": 0,
        "domain": "arithmetic",
        "prompt": "",
        "answer": "",
        "seed": 0,
        "max_new_tokens": 64,
    }
    size = len(prompt_ids) + len(sampled)
    tokens = TokenColumns(
        ids=[*prompt_ids, *sampled],
        loss_mask=[False] * len(prompt_ids) + [True] * len(sampled),
        behaviour_logprobs=[0.0] * len(prompt_ids) + logprobs,
        weight_versions=[0] * size,
        turns=[0] * size,
    )
    return Sample(RolloutRequest(**(fields | request), prompt_ids=tuple(prompt_ids)), tokens, text, "stop")  # type: ignore[arg-type]
