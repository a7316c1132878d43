"""EleutherAI's lm-evaluation-harness on a model of ours, dense and sparse: `pip install 'winnow[harness]'`.

    torchrun launch/stage.py +stage=evaluate eval.harness=[TASK,...] [eval.harness_path=FOLDER] [eval.harness_limit=N]

The harness makes the prompts and grades; `HarnessModel` scores and answers them. A text is one document as in training:
the beginning-of-sequence token, then its tokens. Requests are packed into common sequences, shared out over the ranks.
What is longer than max_position_embeddings loses its beginning, as everywhere in the harness, and is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from conf.errors import UserError
from data.tokenizer import encode_texts
from model import Transformer
from model.generate import Ask, Sampling, generate
from rl.stop import StopStrings
from train import distributed

T = TypeVar("T")
PACKED = 4096  # tokens of one sequence of requests; a longer request is alone
HEAD_ROWS = 512  # rows whose logits exist at a time
MAX_NEW_TOKENS = 256  # where a task does not say
Results = dict[str, dict[str, float]]  # task -> metric -> value
Scored = tuple[list[int], int]  # ids, and how many of the last ones are asked about


class HarnessModel:
    """The three questions of `lm_eval.api.model.LM`. Every rank is asked all of them and takes its share; `truncated`
    counts the requests of this share that lost their beginning. `seed`: of sampled answers."""

    def __init__(self, net: Transformer, tokenizer: Any, attention: str, autocast: torch.dtype | None, seed: int = 0):
        self.net, self.tokenizer, self.attention, self.autocast = net, tokenizer, attention, autocast
        self.max_length, self.truncated, self.seed = net.config.max_position_embeddings, 0, seed
        self.prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(context, continuation) -> log p(continuation | context) in nats, and whether greedy decoding says it."""
        return self._shared(
            [request.args for request in requests], lambda share: self.score([self._pair(*args) for args in share])
        )

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """(text,) -> log p(text) in nats, however long: cut into windows that each see as much context as fits."""
        from lm_eval.utils import get_rolling_token_windows

        windows: list[Scored] = []
        counts = []
        for request in requests:
            (ids,) = encode_texts(self.tokenizer, [request.args[0]])
            mine = [
                ([*seen, predicted[-1]], len(predicted))
                for seen, predicted in get_rolling_token_windows(ids, self.prefix, self.max_length - 1, 1)
            ]
            windows += mine
            counts.append(len(mine))
        found = iter(self._shared(windows, self.score))
        return [math.fsum(next(found)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """(context, settings) -> the text up to the first string of `until`; greedy unless `do_sample`."""
        return self._shared([(i, *request.args) for i, request in enumerate(requests)], self._answers)

    def _pair(self, context: str, continuation: str) -> Scored:
        """Both are encoded as one text, for a token may reach across; spaces at the border go to the continuation."""
        bare = context.rstrip()
        continuation, context = context[len(bare) :] + continuation, bare
        whole, before = encode_texts(self.tokenizer, [context + continuation, context])
        asked = max(len(whole) - len(before), 1)
        return self._cut([self.prefix, *whole], asked)

    def _cut(self, ids: list[int], asked: int, room: int | None = None) -> Scored:
        room = self.max_length if room is None else room
        if len(ids) <= room:
            return ids, asked
        self.truncated += 1
        return ids[-room:], min(asked, room - 1)

    @torch.no_grad()
    def score(self, asked: Sequence[Scored]) -> list[tuple[float, bool]]:
        """The log-probability of the last ids of each, and whether all of them are the likeliest."""
        device = self.net.embed_tokens.weight.device
        found: dict[int, tuple[float, bool]] = {}
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            for group in _packed([len(ids) - 1 for ids, _ in asked]):
                ids: list[int] = []
                starts: list[int] = []
                rows: list[int] = []
                targets: list[int] = []
                spans: list[int] = []
                for i in group:
                    one, count = asked[i]
                    begin, size = len(ids), len(one) - 1  # the last id is only asked for
                    ids += one[:-1]
                    starts += [begin] * size
                    rows += range(begin + size - count, begin + size)
                    targets += one[-count:]
                    spans.append(count)
                hidden = self.net.hidden(
                    torch.tensor(ids, device=device), torch.tensor(starts, device=device), self.attention
                )
                logprobs, best = self._head(hidden, rows, targets)
                parts = zip(group, logprobs.split(spans), best.split(spans), strict=True)
                found |= {i: (float(logp.double().sum()), bool(right.all())) for i, logp, right in parts}
        return [found[i] for i in range(len(asked))]

    def _head(self, hidden: torch.Tensor, rows: list[int], targets: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """[n] log-probabilities of the targets at these rows, and whether each is the likeliest."""
        where, wanted = (torch.tensor(values, device=hidden.device) for values in (rows, targets))
        logprobs, best = [], []
        for place, target in zip(where.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True):
            logits = self.net.lm_head(hidden[place])
            logprobs.append(logits.log_softmax(-1).gather(1, target.unsqueeze(1)).squeeze(1))
            best.append(logits.argmax(-1) == target)
        return torch.cat(logprobs).cpu(), torch.cat(best).cpu()

    def _answers(self, asked: Sequence[tuple[int, str, dict[str, Any]]]) -> list[str]:
        texts: dict[int, str] = {}
        kinds: dict[tuple[float, float, int], list[int]] = {}
        for place, (_, _, settings) in enumerate(asked):
            kinds.setdefault(_sampling(settings), []).append(place)
        for (temperature, top_p, top_k), places in kinds.items():
            asks, stops = [], []
            for place in places:
                number, context, settings = asked[place]
                budget = min(int(settings.get("max_gen_toks", MAX_NEW_TOKENS)), self.max_length // 2)
                (ids,) = encode_texts(self.tokenizer, [context])
                prompt, _ = self._cut([self.prefix, *ids], 1, self.max_length - budget)
                asks.append(Ask(prompt, self.seed + number, budget))
                until = settings.get("until") or []
                strings = [until] if isinstance(until, str) else until
                stops.append(StopStrings([string for string in strings if string], self._text))  # the harness has ""
            device = self.net.embed_tokens.weight.device
            with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
                drawn = generate(
                    self.net,
                    asks,
                    Sampling(temperature, top_p, top_k),
                    self.tokenizer.eos_token_id,
                    self.attention,
                    stopped=lambda i, ids: bool(stops[i].strings) and stops[i].ended_by_last(ids),  # noqa: B023
                )
            for place, stop, one in zip(places, stops, drawn, strict=True):
                ids = one.ids[:-1] if one.ids[-1] == self.tokenizer.eos_token_id else one.ids
                texts[place] = stop.cut(self._text(ids))
        return [texts[place] for place in range(len(asked))]

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _shared(self, asked: list[Any], answer: Callable[[Sequence[Any]], list[T]]) -> list[T]:
        """`answer` of all, each rank having worked on every world-th."""
        rank, world = distributed.rank(), distributed.world_size()
        parts = distributed.gather_objects(answer(asked[rank::world]))
        return [parts[i % world][i // world] for i in range(len(asked))]


def _packed(lengths: Sequence[int]) -> Iterable[list[int]]:
    """Numbers of the requests that share a sequence, those of like length together."""
    group: list[int] = []
    size = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and size + lengths[i] > PACKED:
            yield group
            group, size = [], 0
        group.append(i)
        size += lengths[i]
    if group:
        yield group


def _sampling(settings: dict[str, Any]) -> tuple[float, float, int]:
    """(temperature, top_p, top_k) of a task's generation settings."""
    if not settings.get("do_sample", False):
        return 0.0, 1.0, 0
    return float(settings.get("temperature", 1.0)), float(settings.get("top_p", 1.0)), int(settings.get("top_k", 0))


def require_harness() -> Any:
    """The package. UserError where it is not installed."""
    try:
        import lm_eval
    except ImportError as error:
        raise UserError("eval.harness needs the package lm-eval: pip install 'winnow[harness]'") from error
    return lm_eval


def run_harness(
    model: HarnessModel, tasks: Sequence[str], path: str | None = None, limit: int | None = None
) -> Results:
    """task -> metric (the harness's name, `acc,none`) -> value, `..._stderr` beside it. All ranks call it.

    `path`: a folder of task files; then the harness's own, which load their data from the hub, are found as well.
    UserError for a task that nobody knows.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    if path is not None and not Path(path).is_dir():
        raise UserError(f"eval.harness_path={path} is no folder: give one with task files (YAML)")

    class Adapter(LM):
        loglikelihood = staticmethod(model.loglikelihood)
        loglikelihood_rolling = staticmethod(model.loglikelihood_rolling)
        generate_until = staticmethod(model.generate_until)

    def unknown_to(manager: Any) -> list[str]:
        return [task for task in tasks if not manager.match_tasks([task])]

    manager = TaskManager(include_path=path, include_defaults=path is None)
    if path is not None and unknown_to(manager):  # some are the harness's own, thousands of files that take their time
        manager = TaskManager(include_path=path)
    unknown = unknown_to(manager)
    if unknown:
        raise UserError(
            f"eval.harness={unknown[0]} is no task of the harness: give eval.harness_path=FOLDER if it is yours"
        )
    found = simple_evaluate(
        Adapter(), tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=1000
    )
    return {
        task: {name: float(value) for name, value in values.items() if _is_number(value)}
        for task, values in found["results"].items()
    }


def side_by_side(dense: Results, sparse: Results) -> list[dict[str, Any]]:
    """A row a task and metric; None where a metric is finite under the other attention alone."""
    return [
        {"task": task, "metric": metric, "dense": values.get(metric), "sparse": sparse[task].get(metric)}
        for task, values in dense.items()
        for metric in dict.fromkeys([*values, *sparse[task]])
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
