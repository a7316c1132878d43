"""What a run is, as plain frozen dataclasses: the only form of the configuration that code sees.

YAML can set nothing that is not a field here; `conf/load.py` turns Hydra's result into these and reports typos and
wrong types, `conf/validate.py` holds the rules that span fields. This file imports no torch and no Hydra.
Architecture fields carry the names of Hugging Face's `DeepseekV32Config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

TASK_LEVELS = {  # data/tasks: hardest of each
    "arithmetic": 18,
    "words": 6,
    "sorting": 8,
    "countdown": 5,
    "counting": 9,
    "copying": 8,
}
LONG_LEVELS = {  # data/tasks/long: the highest level of each
    "needle": 2, "queries": 8, "values": 8, "kv": 2, "variables": 8, "hops": 4, "common": 5, "copy": 16, "repeat": 1,
}  # fmt: skip
ENVIRONMENT_LEVELS = {"calculator": 3, "search": 3, "programs": 3, "tickets": 4}  # rl/env: hardest of each
STAGES = ("pretrain", "dense_warmup", "sparse_adapt", "sft", "grpo", "evaluate")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `factor` 1 is plain RoPE; above 1 it is YaRN (arXiv 2309.00071) as DeepSeek-V3 uses it."""

    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3-family architecture with a lightning indexer (DeepSeek-V3.2). Names are Hugging Face's."""

    vocab_size: int = 1536
    hidden_size: int = 128
    intermediate_size: int = 384
    moe_intermediate_size: int = 96
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_routed_experts: int = 8
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    n_group: int = 2
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 1
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    num_nextn_predict_layers: int = 1
    mtp: str = "keep"  # keep | drop the multi-token-prediction layer of a checkpoint
    index_n_heads: int = 16
    index_head_dim: int = 32
    index_topk: int = 64

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_mtp_layers(self) -> int:
        return self.num_nextn_predict_layers if self.mtp == "keep" else 0


@dataclass(frozen=True)
class MixConfig:
    """One source of a mix, under a name of the user's choice. `weight`: its share of tokens, beside the others'."""

    source: str = "files"  # stdlib | files | hf
    path: str | None = None
    split: str = "train"
    text_key: str = "text"
    weight: float = 1.0
    min_tokens: int = 1  # shorter documents are left out
    max_tokens: int | None = None  # and longer ones: a path taken twice has a weight for each range of lengths


@dataclass(frozen=True)
class LongDocumentsConfig:
    """Documents of at least `tokens` tokens occur `times` times in an epoch of training."""

    tokens: int = 8192
    times: int = 1


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"  # stdlib | synthetic | files | hf | mix
    path: str | None = None  # files: file, glob or folder; hf: a `datasets` name or a local set
    split: str = "train"  # hf: the split to read
    text_key: str = "text"
    tokenizer: str = "auto"  # auto | bytes | a tokenizer folder | train:VOCAB
    seq_len: int = 512
    heldout: float = 0.1  # share of documents (by hash) that no training step ever sees
    synthetic_share: float = 0.0  # share of tokens of worked problems mixed into another source
    operand_digits: int = 2  # synthetic: decimal digits of an operand
    tasks: tuple[str, ...] = ()  # synthetic: TASK or TASK:LEVEL, mixed; none: arithmetic of operand_digits
    worked_share: float = 1.0  # synthetic: share of problems that show their working; the rest answer at once
    long_tasks: tuple[str, ...] = ()  # long-context problems to mix in: TASK or TASK:LEVEL of data/tasks/long
    long_share: float = 0.0  # share of tokens of them, beside the source's and `synthetic_share`
    long_min: int = 128  # tokens of the shortest; lengths are drawn log-uniformly
    long_max: int | None = None  # of the longest; null: data.seq_len
    long_questions: int = 16  # that one context is asked at most
    max_bad_rows: int = 100  # malformed rows that are skipped before it is an error
    mix: dict[str, MixConfig] = field(default_factory=dict)  # {NAME: a source} of source=mix
    long_documents: LongDocumentsConfig = field(default_factory=LongDocumentsConfig)
    packing: str = "concat"  # concat (cut every seq_len tokens) | best_fit (documents stay whole where they fit)
    max_split: float = 0.02  # best_fit: share of the documents that fit which it may cut, where padding were above 2%
    streaming: bool = False  # hf: read over the network, nothing but the tokens is kept
    max_documents: int | None = None  # of a source, the first ones
    max_tokens: int | None = None  # of a source and split, the first ones
    max_document_bytes: int = 8 << 20  # longer documents are skipped: what one may cost in memory
    workers: int = 0  # processes that tokenise; 0: as many as there are CPUs, 16 at most. The tokens are the same
    dedup: float | None = None  # similarity (Jaccard, of runs of five words) from which the later document is dropped
    decontaminate: tuple[str, ...] = ()  # files of evaluation sets; documents that share 13 words in a row are dropped


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    seed: int = 0
    micro_batches: int = 1  # sequences that one data-parallel replica takes in a step
    log_every: int = 10
    save_every: int = 100
    keep_checkpoints: int = 2
    async_save: bool = True  # checkpoints are written while training goes on, from a copy in CPU memory
    mtp_weight: float = 0.1  # lambda of DeepSeek-V3, eq. 25
    balance_weight: float = 1e-4  # alpha of DeepSeek-V3, eq. 17
    bias_update_speed: float = 1e-3  # gamma of DeepSeek-V3, sec. 2.1.2
    activation_checkpointing: bool = False
    max_skipped_steps: int = 10  # steps lost to the loss guards before the run stops
    spike_factor: float = 3.0  # a loss above this multiple of the high losses of the last steps is a spike
    eval_sequences: int = 32  # evaluate: held-out sequences
    hang_limit_s: float = 3600.0  # without a finished step before the job is ended with all stacks; 0: never
    threads: int = 0  # CPU threads a process; 0 leaves torchrun's choice


@dataclass(frozen=True)
class OptimConfig:
    lr: float | None = None  # null: the stage's own (train/stages.py), by the width of the model
    indexer_lr: float | None = None  # null: the stage's own
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # global gradient norm; 0 switches clipping off
    schedule: str = "cosine"  # cosine | constant
    warmup_steps: int = 10
    final_lr_share: float = 0.1  # cosine ends at this share of lr


@dataclass(frozen=True)
class ParallelConfig:
    zero: int = 1
    ep: int = 1
    cp: int = 1
    persist_below: int = 100_000  # ZeRO-3: parameters with fewer values stay whole on every rank
    offload: str = "none"  # none | cpu | nvme: where the optimiser's weights and moments are kept between its steps
    offload_parameters: bool = False  # ZeRO-3: keep what no layer is using in CPU memory too
    nvme_path: str | None = None  # of offload=nvme: a folder on a local disk
    pp: int = 1  # groups of ranks that share the layers out in depth
    pp_schedule: str = "1f1b"  # 1f1b | interleaved | zbv | dualpipev: docs/parallel.md


@dataclass(frozen=True)
class PrecisionConfig:
    name: str = "fp32"  # fp32 | bf16 (fp32 parameters, bf16 matrix products) | fp8


@dataclass(frozen=True)
class OpsConfig:
    workspace_mib: int | None = None  # of one op beside inputs, outputs, gradients; default 256 on a CPU, 2048 on a GPU
    deterministic: bool = False  # Triton: backward adds in a fixed order instead of with atomics (torch does)
    fp8_index: bool = False  # select with scores in FP8 (Hadamard, e4m3, power-of-two scales), as V3.2 infers


@dataclass(frozen=True)
class AlertsConfig:
    """Limits of train/alerts.py, over medians of `window` logged rows; 0 switches a limit off."""

    on: bool = True
    window: int = 5  # logged rows
    kl_ref: float = 0.2  # nats a token of policy/kl_ref
    kl_rise: float = 4.0  # times the window before; above a tenth of kl_ref
    recall_drop: float = 0.1  # below the run's best, of what the indexer recalls or captures
    mismatch_k3: float = 0.01  # nats a token between sampler and trainer
    mismatch_rise: float = 10.0  # times the run's start; above a tenth of mismatch_k3
    truncated: float = 0.3  # share of rollouts that their limit ended
    skipped_steps: int = 1  # lost to the guards within the window


@dataclass(frozen=True)
class TrackerConfig:
    name: str = "wandb"  # wandb (offline where no WANDB_API_KEY is set) | none
    project: str = "winnow"
    run_name: str | None = None
    table_every: int | None = None  # iterations between tables of samples; null: as often as table_rows allows
    table_rows: int = 2000  # of a run's table, which lies in memory until it ends
    table_chars: int = 2000  # of a text in it; the middle of a longer one is left out
    alerts: AlertsConfig = field(default_factory=AlertsConfig)  # also without a tracker


@dataclass(frozen=True)
class DomainConfig:
    """What a domain of mixed RL has of its own; null: as the run has it. Either all domains bring their prompts, by
    `path`, `tasks` or `env`, or none does and they are the rows of `rl.path` that name them in the column `domain`."""

    path: str | None = None
    tasks: tuple[str, ...] = ()
    env: str | None = None
    use_tools: bool | None = None
    share: float = 1.0  # of the prompts, beside the shares of the other domains
    max_new_tokens: int | None = None
    beta: float | None = None
    outcome: str | None = None
    format_weight: float | None = None
    length_penalty: float | None = None
    length_shape: str | None = None
    overlong_cache: int | None = None
    language: str | None = None
    language_weight: float | None = None
    judge_weight: float | None = None


@dataclass(frozen=True)
class ToolsConfig:
    """Tools in the middle of reasoning (DeepSeek-V3.2, sec. 3.2). An environment brings its own; `names` are for
    prompts that have none."""

    names: tuple[str, ...] = ()  # calculator | python | search | open | submit, or MODULE:CLASS of your own
    mcp: tuple[str, ...] = ()  # command lines of MCP servers over stdio, whose tools are offered as well
    concurrent: int = 128  # trajectories that a rank plays at a time; each may hold a sandbox
    max_turns: int = 16  # messages of the assistant in a trajectory
    max_calls: int = 20  # of a trajectory; what is past them gets an error to read
    timeout_s: float = 120.0  # of a call
    seconds: float = 600.0  # of all calls of a trajectory
    result_chars: int = 8000  # of a result; the middle of a longer one is left out
    reasoning: str = "v3_2"  # v3_2 | keep | v4 | drop: which thoughts stay in the context, see docs/tool_use.md
    context: str = "none"  # none | summary | discard_75 | discard_all, once `context_share` of the window is full
    context_share: float = 0.8  # DeepSeek-V3.2, sec. 4.4
    corpus: str | None = None  # of `search` and `open`: JSONL of {"id", "title", "text"}
    search_url: str | None = None  # an HTTP endpoint in place of a corpus, see docs/tools.md
    search_key_env: str | None = None  # variable that holds its key
    sandbox: str = "auto"  # auto | bubblewrap | namespaces | unprotected_model_code_runs_as_me
    sandbox_memory_mib: int = 512  # of one trajectory's interpreter


@dataclass(frozen=True)
class ServersConfig:
    """The rollout servers of `rl.engine=vllm | sglang`: docs/servers.md."""

    urls: tuple[str, ...] = ()  # http://HOST:PORT of each
    key_env: str | None = None  # variable that holds the servers' key (their --api-key); null: none
    concurrent: int = 256  # requests that a rank has at one server at a time
    request_s: float = 1800.0  # of one request, from asking to its last byte
    retries: int = 8  # of a request that failed, wherever it is asked again
    treat_as: str | None = None  # a version whose protocol is known: read servers of an unknown one like it
    health_s: float = 2.0  # between looks at the servers
    dead_s: float = 900.0  # without a single server that may be asked, before the run ends
    sync: str = "disk"  # disk | broadcast: how the weights of an iteration come to them
    sync_s: float = 1800.0  # that a server may take for new weights
    folder: str | None = None  # disk: where they are written, the same path on every server; null: OUTPUT_DIR/servers
    bucket_mib: int = 512  # broadcast: of tensors that are announced at a time
    address: str | None = None  # broadcast: of rank 0's machine, as the servers see it; null: its host name
    checksum: bool = True  # compare what the servers hold after each sync, where they can say


@dataclass(frozen=True)
class RLConfig:
    path: str | None = (
        None  # rows of {"prompt", "answer"}: JSONL, Parquet or hf:NAME (`datasets`); null: generated here
    )
    tasks: tuple[str, ...] = ()  # TASK or TASK:LEVEL, mixed, where there is no path; none: data.tasks
    env: str | None = None  # ENV or ENV:LEVEL of rl/env, where there is no path: problems with tools and a verifier
    domains: dict[str, DomainConfig] = field(default_factory=dict)  # {NAME: what differs there}, one stage for all
    prompts_per_step: int = 16  # prompts of the whole world in an iteration
    group_size: int = 8  # G: samples a prompt
    dynamic_sampling: bool = False  # groups of equal rewards are replaced by those of further prompts
    max_resample: int = 3  # rounds of further prompts in an iteration; what is still equal then stays
    mini_batches: int = 1  # optimiser steps an iteration
    max_new_tokens: int = 64
    rollout_tokens: int | None = None  # that a sample may draw in an iteration; it goes on in the next. null: all
    rollout_copy: bool = True  # where ZeRO-3 or ep cut the weights; false: ranks decode on them in lock-step
    one_step_off: bool = False  # an iteration's samples are drawn beside the update before it, by the weights before it
    engine: str = "native"  # native (in this process) | vllm | sglang: who draws; servers of `servers.urls`
    servers: ServersConfig = field(default_factory=ServersConfig)
    # iterations that the weights behind a trained token may be old, while servers draw on through updates; 0: they wait
    max_staleness: int = 0
    stop: tuple[str, ...] = ()  # strings that end a sample; its text ends before them
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # words that may be drawn; 0: all
    keep_sampling_mask: bool = True  # the trainer's softmax runs over the words that top-p and top-k kept
    keep_routing: bool = True  # the trainer repeats the experts that the sampler chose
    keep_selection: bool = False  # and the positions that its indexer selected; needs record_selection
    # for mismatch/index_overlap; 4 x layers x index_topk bytes a token (V3.2: 500 KB); null: where 1 GiB holds them
    record_selection: bool | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    loss_mean: str = "sequence"  # sequence (a mean a sequence, then over sequences: eq. 5) | token (over all tokens)
    old_logprobs: str = "sampler"  # whose log-probs pi_old is: the sampler's | the trainer's, before the first step
    importance_cap: float | None = None  # C of the weight min(pi_old / pi_sampler, C); needs old_logprobs=trainer
    beta: float = 0.0  # strength of the KL to the reference (DeepSeek-V3.2, eq. 7)
    kl_estimator: str = "unbiased"  # unbiased (eq. 7) | k3: without the ratio, as in DeepSeekMath and R1
    advantage_std: bool = False  # DeepSeek-V3.2 subtracts the mean only
    reference_on_cpu: bool = False  # it lies in CPU memory but while it scores an iteration, before its first step
    reference_refresh: int = 0  # iterations between copies of the policy into the reference; 0: never
    off_policy_delta: float | None = None  # eq. 9: bad sequences whose mean log(pi_old/pi) is above are masked
    # exact_match | math_verify | task | environment (its verifier) | judge (by the row's rubric) | proof
    outcome: str = "exact_match"
    format_weight: float = 0.0  # reward of a closed thought with an answer behind it
    length_penalty: float = 0.0  # strength; linear: share of its reward that a right answer of full length loses
    length_shape: str = "linear"  # linear | soft_overlong (DAPO) | group_relative (Kimi k1.5), see docs/rewards.md
    overlong_cache: int = 16  # soft_overlong: last tokens of max_new_tokens, over which the penalty grows
    language: str = "none"  # latin | han | ... | none: script that the thought should be written in
    language_weight: float = 0.0  # reward of a thought wholly in it
    judge_url: str | None = None  # OpenAI-compatible, http://host:8000/v1; for outcome=judge | proof, judge_weight
    judge_model: str | None = None
    judge_key_env: str | None = "OPENAI_API_KEY"  # variable that holds its key; null: an endpoint without keys
    judge_timeout_s: float = 120.0  # of one request
    judge_retries: int = 3  # of a request that failed for the moment
    judge_workers: int = 8  # requests at a time, of each rank
    judge_budget: int | None = None  # requests of the whole run, repetitions included; null: no limit
    judge_weight: float = 0.0  # reward of a full score by the row's rubric, beside another outcome
    use_tools: bool = True  # false: prompts are asked without the tools that they or the run have
    tools: ToolsConfig = field(default_factory=ToolsConfig)
    reward_timeout_s: float = 10.0
    reward_workers: int = 1
    eval_every: int = 0  # grpo: iterations between measurements of held-out accuracy; 0: never
    eval_prompts: int = 256  # evaluate: held-out problems, of each domain that brings its own
    pack_len: int = 1024  # tokens of one packed training sequence
    pretrain_tokens: float | None = None  # of the base, for flops/rl_over_pretrain; null: by the runs behind init_from

    @property
    def mixes(self) -> bool:
        """Whether the domains bring their own prompts."""
        return any(domain.path is not None or domain.tasks or domain.env for domain in self.domains.values())

    def of(self, domain: str) -> RLConfig:
        """The settings that hold for prompts of a domain."""
        own = self.domains.get(domain)
        if own is None:
            return self
        brought = ("path", "tasks", "env")
        data: dict[str, Any] = {name: getattr(own, name) for name in brought} if self.mixes else {}
        names = [spec.name for spec in fields(own) if spec.name not in (*brought, "share")]
        given = {name: value for name in names if (value := getattr(own, name)) is not None}
        return replace(self, domains={}, **data, **given)

    def selection_bytes(self, model: ModelConfig) -> int:
        """The most that recorded selections may take on a rank that has all samples of an iteration."""
        samples = min(self.prompts_per_step * self.group_size, 256)
        return 4 * model.num_hidden_layers * model.index_topk * samples * self.pack_len

    def records_selection(self, model: ModelConfig) -> bool:
        given = self.record_selection
        return self.selection_bytes(model) <= 1 << 30 if given is None else given

    @property
    def views(self) -> list[RLConfig]:
        """All settings that prompts of this run may be under: of every domain, and of those without a name here."""
        own = [self.of(name) for name in self.domains]
        return own if self.mixes else [self, *own]

    @property
    def offers_tools(self) -> bool:
        """Whether prompts under these settings are asked with tools."""
        return self.use_tools and (self.env is not None or bool(self.tools.names or self.tools.mcp))

    @property
    def needs_tools(self) -> bool:
        return any(view.offers_tools or view.env is not None for view in self.views)

    @property
    def needs_judge(self) -> bool:
        return any(view.outcome in ("judge", "proof") or view.judge_weight > 0 for view in self.views)

    @property
    def needs_reference(self) -> bool:
        return any(view.beta > 0 for view in self.views)


@dataclass(frozen=True)
class EvalConfig:
    """What the evaluate stage measures beside held-out losses and accuracy: docs/evaluation.md."""

    by_position: bool = True  # losses, recall and overlap by how much context a token has
    margin: float = 0.01  # nats a token that sparse attention may lose before it counts as a departure
    short_context: int = 512  # tokens of context up to which parity is judged
    buckets_per_octave: int = 1  # of context; 2: half octaves
    tasks: tuple[str, ...] = ()  # TASK or TASK:LEVEL of data/tasks/long
    lengths: tuple[int, ...] = ()  # tokens of a problem, answer included; none: data.seq_len
    depths: int = 5  # places of the needle, from the first to the last of the context, evenly
    problems: int = 20  # held-out problems of every task, length and depth
    k_sweep: tuple[int, ...] = ()  # losses and tasks with these in place of model.index_topk as well
    compare_with: str | None = None  # another run or Hugging Face folder, on the same tokens
    compare_attention: str = "dense"  # dense | sparse: what the other one attends with
    speed_lengths: tuple[int, ...] = ()  # tokens of context behind which prefill and decoding are timed
    harness: tuple[str, ...] = ()  # tasks of lm-evaluation-harness (pip install 'winnow[harness]')
    harness_path: str | None = None  # a folder with task files (YAML) of your own
    harness_limit: int | None = None  # problems of each task; null: all


@dataclass(frozen=True)
class RunConfig:
    stage: str
    output_dir: str
    init_from: str | None = None
    resume: str = "auto"  # auto | never (a folder that holds a run is then refused)
    kernels: str = "auto"  # of the attention ops: torch | triton | cudnn; auto: triton on a GPU, torch elsewhere
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
