"""Each rule fires on what it forbids, stays quiet beside it, and none hides another."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf.convert import leaf_types, to_dict
from conf.errors import UserError
from conf.load import load
from conf.validate import CHOICES, INTERVALS, MAY_BE_ZERO, RULES, check, contains, flatten, violations, warnings

JUDGE = "rl.judge_url=http://h:8000/v1 rl.judge_model=m rl.path=x.jsonl"


def found(*argv: str, stage: str = "grpo", world_size: int = 1) -> list[str]:
    return violations(load([f"+stage={stage}", *argv]).config, world_size)


@pytest.mark.parametrize("stage", CHOICES["stage"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_defaults_keep_every_rule(stage: str, world_size: int) -> None:
    assert found(stage=stage, world_size=world_size) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train.steps=0", "train.steps=0 is too small: give 1 or more"),
        ("model.hidden_size=-8", "model.hidden_size=-8 is too small: give 1 or more"),
        ("train.seed=-1", "train.seed=-1 is too small: give 0 or more"),
        ("data.heldout=1.0", "data.heldout=1 is outside [0, 1): give a value inside"),
        ("data.heldout=-0.1", "data.heldout=-0.1 is outside [0, 1): give a value inside"),
        ("data.synthetic_share=1.5", "data.synthetic_share=1.5 is outside [0, 1): give a value inside"),
        ("optim.lr=0", "optim.lr=0 is outside (0, inf): give a value inside"),
        ("optim.clip=-1", "optim.clip=-1 is outside [0, inf): give a value inside"),
        ("optim.beta2=1", "optim.beta2=1 is outside [0, 1): give a value inside"),
        ("rl.clip_low=1.5", "rl.clip_low=1.5 is outside (0, 1]: give a value inside"),
        ("rl.clip_high=0", "rl.clip_high=0 is outside (0, inf): give a value inside"),
        ("rl.top_p=0", "rl.top_p=0 is outside (0, 1]: give a value inside"),
        ("rl.temperature=0", "rl.temperature=0 is outside (0, inf): give a value inside"),
        ("rl.pretrain_tokens=0", "rl.pretrain_tokens=0 is outside (0, inf): give a value inside"),
        (
            "tracker.alerts.truncated=1.5",
            "tracker.alerts.truncated=1.5 is no share: give a value in [0, 1], 0 is off",
        ),
        (
            "tracker.alerts.kl_rise=0.5",
            "tracker.alerts.kl_rise=0.5 is no rise: give a factor above 1, 0 is off",
        ),
        ("rl.beta=-0.1", "rl.beta=-0.1 is outside [0, inf): give a value inside"),
        ("data.source=file data.path=x", "data.source=file is not known: did you mean files?"),
        ("kernels=trition", "kernels=trition is not known: did you mean triton?"),
        ("resume=always", "resume=always is not known: valid: auto, never"),
        ("model.mtp=dorp", "model.mtp=dorp is not known: did you mean drop?"),
        ("optim.schedule=cosin", "optim.schedule=cosin is not known: did you mean cosine?"),
        ("precision.name=fp16", "precision.name=fp16 is not known: did you mean bf16?"),
        ("parallel.zero=4", "parallel.zero=4 is no ZeRO stage: use 0, 1, 2 or 3"),
        ("parallel.offload=gpu", "parallel.offload=gpu is not known: did you mean cpu?"),
        ("kernels=cudnn", "kernels=cudnn is not supported yet: use kernels=auto, kernels=triton or kernels=torch"),
        (
            "ops.fp8_index=true model.index_head_dim=48",
            "ops.fp8_index=true cannot take model.index_head_dim=48: one scale covers at most 128 channels and the"
            " Hadamard transform needs a power of two; give such a width or ops.fp8_index=false",
        ),
        ("ops.workspace_mib=0", "ops.workspace_mib=0 is too small: give 1 or more"),
        ("rl.tools.reasoning=v3", "rl.tools.reasoning=v3 is not known: did you mean v3_2?"),
        (
            "rl.tools.sandbox=off",
            "rl.tools.sandbox=off is not known: valid: auto, bubblewrap, namespaces, unprotected_model_code_runs_as_me",
        ),
        ("rl.tools.context_share=1", "rl.tools.context_share=1 is outside (0, 1): give a value inside"),
        ("rl.tools.max_turns=0", "rl.tools.max_turns=0 is too small: give 1 or more"),
        ("rl.env=serch rl.outcome=environment", "rl.env=serch is not known: did you mean search?"),
        (
            "rl.env=my.world:World",
            "rl.env=my.world:World has a verifier of its own: give rl.outcome=environment instead of exact_match",
        ),
        ("rl.env=search:4 rl.outcome=environment", "rl.env=search:4 has no such level: give search:1 to search:3"),
        ("rl.env=verifiers rl.outcome=environment", "rl.env=verifiers names no taskset: give verifiers:ID"),
        (
            "rl.env=search",
            "rl.env=search has a verifier of its own: give rl.outcome=environment instead of exact_match",
        ),
        (
            "rl.outcome=environment",
            "rl.outcome=environment has no environment to ask: give rl.env=NAME, or another outcome",
        ),
        (
            "rl.env=search rl.outcome=environment rl.path=x.jsonl",
            "rl.path=x.jsonl is not read beside rl.env=search: leave one of them out",
        ),
        (
            "rl.env=search rl.outcome=environment rl.rollout_tokens=8",
            "rl.rollout_tokens=8 would cut a trajectory in the middle, whose tools no checkpoint can keep: set it to"
            " null",
        ),
        (
            "rl.env=search rl.outcome=environment rl.stop=[x]",
            "rl.stop would end a message before its end of sequence, behind which tools answer: leave it out",
        ),
        (
            "rl.env=search rl.outcome=environment rl.rollout_copy=false parallel.zero=3",
            "rl.rollout_copy=false has all ranks decode in step, and trajectories with tools have not the same number"
            " of messages: give rl.rollout_copy=true",
        ),
        (
            "rl.tools.names=[open]",
            "rl.tools.names has open and nothing to look in: give rl.tools.corpus=FILE or"
            " rl.tools.search_url=http://HOST/search",
        ),
        (
            "rl.tools.names=[search] rl.tools.corpus=a.jsonl rl.tools.search_url=http://h",
            "rl.tools.corpus and rl.tools.search_url are both given: search looks in one of them",
        ),
        (
            "rl.domains={a:{env:search:1,outcome:environment},b:{env:tickets:9,outcome:environment}}",
            "domain b: rl.env=tickets:9 has no such level: give tickets:1 to tickets:4",
        ),
        (
            "rl.keep_selection=true rl.record_selection=false",
            "rl.keep_selection=true has nothing to repeat with rl.record_selection=false: set that to true as well",
        ),
        (
            "rl.keep_selection=true rl.pack_len=32768",
            "rl.keep_selection=true has nothing to repeat with rl.record_selection=null, which records none past 1 GiB:"
            " set that to true as well",
        ),
        ("rl.tasks=wrods", "rl.tasks=wrods is not known: did you mean words?"),
        ("data.tasks=[sorting,arithmatic]", "data.tasks=arithmatic is not known: did you mean arithmetic?"),
        ("rl.tasks=words:7", "rl.tasks=words:7 has no such level: give words:1 to words:6"),
        ("rl.tasks=words:", "rl.tasks=words: has no such level: give words:1 to words:6"),
        ("rl.tasks=words:0000000001", "rl.tasks=words:0000000001 has no such level: give words:1 to words:6"),
        (
            "rl.tasks=sorting,countdown:2",
            "rl.outcome=exact_match cannot grade countdown, which has many right answers: give rl.outcome=task",
        ),
        (
            "rl.tasks=sorting,words rl.path=x.jsonl",
            "rl.tasks=sorting,words is not read beside rl.path=x.jsonl: leave one of them out",
        ),
        ("rl.top_k=-1", "rl.top_k=-1 is too small: give 0 or more"),
        (
            "model.tie_word_embeddings=true",
            "model.tie_word_embeddings=true is not supported yet: use model.tie_word_embeddings=false",
        ),
        ("output_dir=", "output_dir is empty: give output_dir=runs/NAME"),
        ("init_from=", "init_from is empty: give a path or leave it out"),
        ("data.source=files", "data.source=files has nothing to read: give data.path=PATH, a file, glob or folder"),
        ("data.source=hf", "data.source=hf has nothing to read: give data.path=PATH, a `datasets` name or a local set"),
        ("data.path=x.txt", "data.path=x.txt is not read by data.source=stdlib: add data.source=files (or hf)"),
        ("data.tokenizer=", "data.tokenizer is empty: use auto, bytes, train:VOCAB or a tokenizer folder"),
        (
            "data.tokenizer=train:100",
            "data.tokenizer=train:100 has no usable size: give train:VOCAB with VOCAB of 264 or more",
        ),
        (
            "data.tokenizer=train:many",
            "data.tokenizer=train:many has no usable size: give train:VOCAB with VOCAB of 264 or more",
        ),
        (
            "data.tokenizer=train:1537",
            "data.tokenizer=train:1537 is larger than model.vocab_size=1536: give train:1536 or less",
        ),
        (
            "data.seq_len=32769",
            "data.seq_len=32769 is past model.max_position_embeddings=32768: give 32768 or less",
        ),
        ("model.qk_rope_head_dim=15", "model.qk_rope_head_dim=15 is odd but rotates pairs: give 16"),
        (
            "model.qk_rope_head_dim=34",
            "model.qk_rope_head_dim=34 does not fit into model.index_head_dim=32: give it 34 or more",
        ),
        ("model.n_group=3", "model.n_routed_experts=8 does not divide by model.n_group=3: give a multiple of 3"),
        (
            "model.n_group=8 model.topk_group=2",
            "model.n_group=8 leaves one expert a group, which is scored by its best two: give fewer groups",
        ),
        ("model.topk_group=3", "model.topk_group=3 is more than model.n_group=2: give 2 or less"),
        (
            "model.num_experts_per_tok=5",
            "model.num_experts_per_tok=5 is more than the 4 experts in model.topk_group=1:"
            " give 4 or less, or a larger topk_group",
        ),
        (
            "model.first_k_dense_replace=5",
            "model.first_k_dense_replace=5 is more than model.num_hidden_layers=4: give less",
        ),
        (
            "rl.group_size=1",
            "rl.group_size=1 has no advantage, which is the reward less its group's mean: give 2 or more",
        ),
        (
            "rl.length_shape=soft_overlong rl.overlong_cache=65",
            "rl.overlong_cache=65 is more than rl.max_new_tokens=64, whose last tokens it is: give 64 or less",
        ),
        (
            "rl.language_weight=0.1",
            "rl.language_weight=0.1 rewards no language: give rl.language=latin or another script",
        ),
        (
            "rl.outcome=judge rl.path=x.jsonl",
            "rl.outcome=judge has no judge to ask: give rl.judge_url=http://HOST:PORT/v1 and rl.judge_model=NAME",
        ),
        (
            "rl.judge_weight=0.5 rl.path=x.jsonl rl.judge_model=m",
            "rl.judge_weight=0.5 has no judge to ask: give rl.judge_url=http://HOST:PORT/v1 and rl.judge_model=NAME",
        ),
        (
            "rl.outcome=proof rl.judge_url=http://h:8000/v1 rl.judge_model=m",
            "rl.outcome=proof cannot judge the generated additions: give rl.path=PATH with rows of prompt",
        ),
        (
            f"rl.outcome=judge rl.judge_weight=1 {JUDGE}",
            "rl.judge_weight=1 counts rl.outcome=judge twice: give rl.judge_weight=0",
        ),
        (
            "rl.judge_url=https://me:secret@h/v1",
            "rl.judge_url holds a name, a key or a query, which would be written down: keys go into rl.judge_key_env",
        ),
        (
            "rl.judge_url=https://h/v1?key=secret",
            "rl.judge_url holds a name, a key or a query, which would be written down: keys go into rl.judge_key_env",
        ),
        (
            "rl.judge_url=http://h:80000/v1",
            "rl.judge_url=http://h:80000/v1 is no address: give http://HOST:PORT/v1 or https://HOST/v1",
        ),
        ("rl.judge_url=h:8000/v1", "rl.judge_url=h:8000/v1 is no address: give http://HOST:PORT/v1 or https://HOST/v1"),
        (
            "rl.judge_url=file:///etc/passwd",
            "rl.judge_url=file:///etc/passwd is no address: give http://HOST:PORT/v1 or https://HOST/v1",
        ),
        (
            "rl.judge_url=http://h/v1/chat/completions",
            "rl.judge_url=http://h/v1/chat/completions holds the path that is added to it: give"
            " rl.judge_url=http://h/v1",
        ),
        ("rl.judge_retries=-1", "rl.judge_retries=-1 is too small: give 0 or more"),
        ("rl.judge_budget=0", "rl.judge_budget=0 is too small: give 1 or more"),
        ("rl.judge_timeout_s=0", "rl.judge_timeout_s=0 is outside (0, inf): give a value inside"),
        ("rl.language=latine", "rl.language=latine is not known: did you mean latin?"),
        ("rl.length_shape=soft", "rl.length_shape=soft is not known: valid: linear, soft_overlong, group_relative"),
        (
            "rl.importance_cap=2",
            "rl.importance_cap=2 has nothing to weigh with rl.old_logprobs=sampler, where pi_old is the sampler's own:"
            " add rl.old_logprobs=trainer, or give rl.importance_cap=null",
        ),
        (
            "rl.importance_cap=0 rl.old_logprobs=trainer",
            "rl.importance_cap=0 is outside (0, inf): give a value inside",
        ),
        ("rl.loss_mean=tokens", "rl.loss_mean=tokens is not known: did you mean token?"),
        ("rl.old_logprobs=train", "rl.old_logprobs=train is not known: did you mean trainer?"),
        ("rl.domains={math:{beta:-1},code:{}}", "domain math: rl.beta=-1 is outside [0, inf): give a value inside"),
        (
            "rl.domains={math:{outcome:math_verfy}}",
            "domain math: rl.outcome=math_verfy is not known: did you mean math_verify?",
        ),
        (
            "rl.domains={math:{max_new_tokens:9999}}",
            "domain math: rl.max_new_tokens=9999 leaves rl.pack_len=1024 no prompt room: raise it",
        ),
        (
            "rl.domains={a/b:{}}",
            "rl.domains has the name 'a/b', which is part of a metric's: give letters, digits, _ - and .",
        ),
        (
            "rl.domains={a:{tasks:[words]},b:{}}",
            "rl.domains.b has no prompts while others bring theirs: give it a path, tasks or env as well",
        ),
        (
            "rl.domains={a:{share:2}}",
            "rl.domains.a.share=2 cannot choose among the rows of one file: leave it out, or give every domain"
            " a path, tasks or env of its own",
        ),
        (
            "rl.domains={a:{tasks:[words],share:0}}",
            "rl.domains.a.share=0 is outside (0, inf): leave the domain out",
        ),
        (
            "rl.domains={a:{tasks:[words]}} rl.path=x.jsonl",
            "rl.path=x.jsonl is not read beside rl.domains, which bring their own prompts: leave one of them out",
        ),
        (
            "rl.domains={a:{tasks:[words],path:x.jsonl}}",
            "domain a: rl.tasks=words is not read beside rl.path=x.jsonl: leave one of them out",
        ),
        (
            "rl.tasks=countdown,words rl.outcome=task rl.domains={countdown:{outcome:math_verify}}",
            "rl.outcome=math_verify cannot grade countdown, which has many right answers: give rl.outcome=task",
        ),
        ("rl.domains={a:{tasks:[word]}}", "domain a: rl.tasks=word is not known: did you mean words?"),
        (
            "rl.domains={a:{tasks:[countdown]}}",
            "domain a: rl.outcome=exact_match cannot grade countdown, which has many right answers: give"
            " rl.outcome=task",
        ),
        (
            "rl.domains={a:{path:x,outcome:judge}}",
            "domain a: rl.outcome=judge has no judge to ask: give rl.judge_url=http://HOST:PORT/v1 and"
            " rl.judge_model=NAME",
        ),
        ('rl.stop=["a",""]', "rl.stop holds an empty string, which every text begins with: leave it out"),
        (
            'rl.stop=["k>"]',
            "rl.stop=k> ends at </think>, so no sample would come to its answer: give a string that follows the answer",
        ),
        (
            "rl.one_step_off=true rl.dynamic_sampling=true",
            "rl.one_step_off=true draws an iteration's samples before rl.dynamic_sampling=true knows which groups to"
            " replace: set one of them to false",
        ),
        (
            "rl.one_step_off=true rl.rollout_copy=false",
            "rl.one_step_off=true draws from a copy of the weights: give rl.rollout_copy=true",
        ),
        (
            "rl.rollout_copy=false parallel.zero=3 rl.beta=0.1",
            "rl.rollout_copy=false spares no rank a whole model, for the KL keeps its reference whole: give"
            " rl.rollout_copy=true, or rl.beta=0 in all domains",
        ),
        (
            "rl.rollout_copy=false parallel.zero=3 rl.eval_every=5",
            "rl.eval_every=5 measures a copy of the weights: give rl.rollout_copy=true or rl.eval_every=0",
        ),
        (
            "rl.rollout_copy=false parallel.zero=3 parallel.offload=cpu parallel.offload_parameters=true",
            "rl.rollout_copy=false would move every parameter from the CPU for every token with"
            " parallel.offload_parameters=true: set one of them the other way",
        ),
        ("rl.rollout_tokens=0", "rl.rollout_tokens=0 is too small: give 1 or more"),
        (
            "rl.eval_every=5 data.heldout=0",
            "data.heldout=0 leaves rl.eval_every=5 nothing to measure on: give a share above 0",
        ),
        ("rl.max_resample=0", "rl.max_resample=0 is too small: give 1 or more"),
        ("rl.mini_batches=129", "rl.mini_batches=129 is more than a process has samples, 128: give 128 or less"),
    ],
)
def test_rule_fires_alone_and_says_how_to_mend_it(argv: str, message: str) -> None:
    assert found(*argv.split()) == [message]


@pytest.mark.parametrize(
    "argv",
    [
        "data.source=files data.path=x",
        "data.tokenizer=train:264",
        "data.tokenizer=train:1536",
        "data.seq_len=32768",
        "rl.clip_low=1 rl.clip_high=10",  # DeepSeek-R1's clip of 10 has no lower bound worth its name
        "rl.top_p=1",
        "optim.clip=0",
        "optim.weight_decay=0",
        "parallel.zero=0",
        "parallel.zero=2",
        "model.topk_group=2 model.num_experts_per_tok=8",
        "model.n_group=1 model.num_experts_per_tok=8",
        "model.first_k_dense_replace=4",
        "model.num_nextn_predict_layers=0",
        "model.index_topk=100000",
        "rl.group_size=2",
        "rl.length_shape=soft_overlong rl.overlong_cache=64",
        "rl.language=han",  # measured, not rewarded
        f"rl.outcome=judge rl.judge_retries=0 {JUDGE}",
        f"rl.outcome=proof {JUDGE}",
        f"rl.judge_weight=1 rl.outcome=math_verify {JUDGE}",
        "rl.tasks=words:6,sorting,countdown:5,counting:9,arithmetic:18 rl.outcome=task",
        "data.tasks=countdown rl.path=x.jsonl",  # the text shows them, the prompts are others
        "rl.importance_cap=2 rl.old_logprobs=trainer",
        "rl.domains={math:{beta:0}}",
        "rl.domains={}",
        "rl.domains={a:{tasks:[countdown],outcome:task,share:0.1},b:{path:x.jsonl,outcome:math_verify}}",
        "rl.tasks=arithmetic,countdown rl.domains={countdown:{outcome:task}}",
        "rl.tasks=arithmetic,countdown rl.outcome=task rl.domains={arithmetic:{outcome:exact_match}}",
        "rl.stop=thinker,User:",
        "rl.rollout_tokens=1 rl.dynamic_sampling=true",
        "rl.rollout_tokens=1 rl.one_step_off=true",
        "rl.rollout_copy=false rl.beta=0.1",
        "rl.rollout_copy=false parallel.zero=3",
    ],
)
def test_the_border_is_allowed(argv: str) -> None:
    assert found(*argv.split()) == []


OFFLOAD = {  # what is set in sparse_adapt -> what is said to it
    "parallel.offload=cpu": [],
    "parallel.offload=cpu parallel.zero=2 parallel.ep=2 parallel.cp=2": [],
    "parallel.offload=cpu parallel.zero=3 parallel.offload_parameters=true": [],
    "parallel.offload=nvme parallel.zero=3 parallel.nvme_path=/x parallel.offload_parameters=true": [],
    "parallel.offload=cpu parallel.zero=0": [
        "parallel.offload=cpu needs ZeRO, which keeps the optimiser's state apart: use parallel.zero=1, 2 or 3"
    ],
    "parallel.offload=nvme parallel.zero=2": [
        "parallel.offload=nvme stays in CPU memory under parallel.zero=2: use parallel.zero=3",
        "parallel.offload=nvme has nowhere to write: give parallel.nvme_path=FOLDER, on a disk of each machine",
    ],
    "parallel.offload=nvme parallel.zero=3 parallel.nvme_path=''": [
        "parallel.nvme_path is empty: give a path or leave it out"
    ],
    "parallel.offload=cpu parallel.nvme_path=/x": [
        "parallel.nvme_path=/x is not used by parallel.offload=cpu: add parallel.offload=nvme"
    ],
    "parallel.offload=cpu parallel.offload_parameters=true": [
        "parallel.offload_parameters=true cannot move what parallel.zero=1 keeps whole: use parallel.zero=3"
    ],
    "parallel.zero=3 parallel.offload_parameters=true": [
        "parallel.offload_parameters=true saves nothing under parallel.offload=none, whose optimiser holds the same"
        " weights: use parallel.offload=cpu"
    ],
}


@pytest.mark.parametrize("argv", OFFLOAD)
def test_offload_that_cannot_work_is_refused(argv: str) -> None:
    assert found(*argv.split(), stage="sparse_adapt", world_size=4) == OFFLOAD[argv]


def test_offload_moves_nothing_where_nothing_trains() -> None:
    message = "parallel.offload=cpu has nothing to move in stage evaluate, which trains nothing: use none"
    assert found("parallel.offload=cpu", stage="evaluate") == [message]
    assert found("parallel.offload=cpu", "parallel.zero=2", stage="grpo") == []


def test_all_violations_are_reported_at_once_a_line_each() -> None:
    argv = "train.steps=0 model.tie_word_embeddings=true model.n_group=3 rl.group_size=1 data.source=files"
    argv = [*argv.split(), "kernels=nvcc"]
    messages = found(*argv)
    assert [message.split("=")[0] for message in messages] == [
        "kernels",
        "train.steps",
        "model.tie_word_embeddings",
        "data.source",
        "model.n_routed_experts",
        "rl.group_size",
    ]
    with pytest.raises(UserError) as caught:
        check(load(["+stage=grpo", *argv]).config)
    assert str(caught.value).split("\n") == messages


def test_check_is_silent_on_a_valid_run() -> None:
    check(load(["+stage=pretrain"]).config, world_size=2)


def test_prompts_divide_by_the_world_in_grpo_only() -> None:
    message = "rl.prompts_per_step=16 does not divide by the world of 3 processes: give rl.prompts_per_step=18"
    assert found(world_size=3) == [message]
    assert found(world_size=4) == []
    assert found(stage="pretrain", world_size=3) == []


def test_prompt_room() -> None:
    assert any("no prompt room" in message for message in found("rl.max_new_tokens=1024"))
    longest = "model.max_position_embeddings=64", "data.seq_len=64"
    assert any("rl.max_new_tokens=64 is past" in message for message in found(*longest))


def test_sequence_divides_by_twice_the_context_ranks() -> None:
    messages = found("parallel.cp=2", "data.seq_len=510", world_size=2)
    assert "data.seq_len=510 does not divide by 2*parallel.cp=4: give data.seq_len=508" in messages
    assert not any("data.seq_len" in message for message in found("parallel.cp=2", "data.seq_len=512", world_size=2))


@pytest.mark.parametrize("axis", ["ep", "cp"])
def test_parallel_axes_divide_the_world(axis: str) -> None:
    assert any("does not divide the world of 3" in message for message in found(f"parallel.{axis}=2", world_size=3))
    assert found(f"parallel.{axis}=2", world_size=4) == []  # grpo
    assert found(f"parallel.{axis}=2", stage="sparse_adapt", world_size=4) == []


def test_experts_are_not_shared_out_in_evaluate() -> None:
    wanted = "parallel.ep=2 is not supported yet in stage evaluate: use parallel.ep=1"
    assert found("parallel.ep=2", stage="evaluate", world_size=2) == [wanted]
    wanted = "parallel.zero=3 is not supported yet in stage evaluate, where every rank holds the model: use another"
    assert found("parallel.zero=3", stage="evaluate") == [wanted]


def test_rows_of_rl_divide_by_twice_the_context_ranks() -> None:
    messages = found("parallel.cp=2", "rl.pack_len=1002", world_size=2)
    assert messages == ["rl.pack_len=1002 does not divide by 2*parallel.cp=4: give rl.pack_len=1004"]


def test_experts_are_shared_out_under_zero_alone() -> None:
    messages = found("parallel.ep=2", "parallel.zero=0", stage="sparse_adapt", world_size=2)
    wanted = "parallel.ep=2 needs ZeRO, which clips by the norm over all experts: use parallel.zero=1"
    assert messages == [wanted]


def test_experts_divide_by_their_ranks() -> None:
    messages = found("parallel.ep=3", world_size=3)
    assert "parallel.ep=3 does not divide model.n_routed_experts=8: give a divisor of 8" in messages


def test_sft_wants_conversations() -> None:
    assert found(stage="sft") == []
    assert found("data.source=stdlib", stage="sft") == [
        "data.source=stdlib holds no conversations, which sft learns from: use data.source=files or synthetic"
    ]


def test_messages_are_single_lines_even_for_hostile_values() -> None:
    config = load(["+stage=grpo"]).config
    config = replace(config, data=replace(config.data, source="a\nb"))
    assert violations(config) == ["data.source=a b is not known: valid: stdlib, synthetic, files, hf, mix"]


def test_warnings_are_no_violations() -> None:
    config = load(["+stage=pretrain", "model.index_topk=512", "train.steps=10"]).config
    assert violations(config) == []
    assert [line.split("=")[0] for line in warnings(config)] == ["model.index_topk", "optim.warmup_steps"]
    assert warnings(load(["+stage=pretrain"]).config) == []
    unasked = ["+stage=grpo", "rl.judge_url=http://h/v1"]
    assert "nothing asks it" in warnings(load(unasked).config)[0]
    assert warnings(load([*unasked, "rl.judge_weight=1"]).config) == []
    (line,) = warnings(load(["+stage=grpo", "rl.rollout_tokens=64"]).config)
    assert line == "rl.rollout_tokens=64 is not below rl.max_new_tokens=64: every sample finishes in its iteration"


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [("(0, 1)", [0.5], [0.0, 1.0]), ("[0, 1]", [0.0, 1.0], [-0.1, 1.1]), ("(0, inf)", [1e9], [0.0])],
)
def test_intervals(interval: str, inside: list[float], outside: list[float]) -> None:
    assert all(contains(interval, value) for value in inside)
    assert not any(contains(interval, value) for value in outside)


def test_tables_name_real_keys() -> None:
    leaves = leaf_types()
    assert set(CHOICES) | set(INTERVALS) | MAY_BE_ZERO <= set(leaves)
    assert set(flatten(to_dict(load(["+stage=sft"]).config))) == set(leaves)


def test_no_rule_stumbles_over_zeros() -> None:
    """Rules run side by side, so each must bear values that another one refuses."""
    zeros = [f"{key}=0" for key, hint in leaf_types().items() if hint is int]
    config = load(["+stage=grpo", *zeros]).config
    assert len([message for rule in RULES for message in rule(config, 2)]) >= len(zeros) - len(MAY_BE_ZERO)


def test_nothing_held_out_is_fine_for_training_and_refused_for_measuring() -> None:
    assert violations(load(["+stage=pretrain", "data.heldout=0"]).config) == []
    (found,) = violations(load(["+stage=evaluate", "data.heldout=0"]).config)
    assert found.startswith("data.heldout=0 leaves evaluate nothing to measure on")


def test_rl_settings_do_not_bind_other_stages() -> None:
    """A model with few positions trains; only what generates needs room for an answer."""
    short = ["model.max_position_embeddings=64", "data.seq_len=48"]
    assert violations(load(["+stage=dense_warmup", *short]).config) == []
    assert any("rl.max_new_tokens=64 is past" in line for line in violations(load(["+stage=grpo", *short]).config))


def test_every_rank_gets_a_share_of_the_judges_budget() -> None:
    argv = ["rl.outcome=judge", "rl.judge_budget=1", *JUDGE.split()]
    assert found(*argv) == []
    assert found(*argv, world_size=2) == [
        "rl.judge_budget=1 is less than a request for each of 2 processes: give more",
    ]
