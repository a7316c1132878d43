"""Memory of one rank, predicted from the configuration alone: what lies there by kind at the fullest moment of a step.

Three moments are asked: the end of the forward, the walk back through the layers with the reduction of gradients behind
it, and the optimiser's step. What DeepSpeed 0.19.8 keeps and copies is read from its source (docs/planner.md says
where), and so is torch 2.13's pipeline under our engine in depth; what torch keeps for backward is
train/activations.py. Bytes everywhere, GB are 1e9.

Not seen: what the process itself takes (CUDA context and NCCL: `Memory.outside`, an assumption on a GPU), imbalance of
experts, and what an allocator cannot hand out again (`Memory.margin`, an assumption too).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from conf.schema import ModelConfig
from train import activations
from train.activations import FP32
from train.ds_config import MAX_BUCKET
from train.job import Held, Job, embedding, held
from train.parallel.depth import cut_in_depth
from train.parameters import parameters
from train.stages import STAGES

WINDOW = 10**9  # values that ZeRO-3 keeps together (stage3_max_live_parameters and _max_reuse_distance)
PREFETCH = 5 * 10**7  # values of one gather ahead of its use (stage3_prefetch_bucket_size)
SUB_GROUP = 10**9  # values of the optimiser that ZeRO-3 steps at a time
FLATTEN = 5 * 10**8  # values that ZeRO-0 flattens at a time
TILE_BYTES, TILE_ROWS = 16 << 20, 1024  # of logits: model/ops/vocab_loss/streaming.py
CPU_WORKSPACE, GPU_WORKSPACE = 16 << 20, 2048 << 20  # what an op's blocks take; a GPU's: train/start.py WORKSPACE_MIB
CPU_ROWS = 64  # of a block: model/ops/index_kl_dense/streaming.py
GPU_OUTSIDE = 1.5e9  # CUDA context, cuBLAS and NCCL buffers; assumed
FRAGMENTATION = 0.06  # of the GPU's memory that PyTorch's allocator cannot hand out again; assumed
KINDS = ("weights", "gradients", "optimiser", "activations", "indexer", "weight_copies", "buffers", "workspace", "kv")


@dataclass(frozen=True)
class Memory:
    """`kinds`: bytes of the device by kind at its fullest moment, of which `moment` says which; `phases`: the most in
    each; `host`: bytes of CPU memory that offload and a save in flight take; `margin`, `outside`: see the file's
    head."""

    kinds: dict[str, float]
    moment: str
    phases: dict[str, float]
    host: float
    margin: float = 0.0
    outside: float = 0.0
    floor: int = 0  # whose rank this is

    @property
    def allocated(self) -> float:
        return sum(self.kinds.values())

    @property
    def total(self) -> float:
        return self.allocated + self.margin + self.outside


@dataclass
class Tally:
    """Bytes by kind, and their largest sum so far."""

    now: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    best: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, count: float) -> None:
        self.now[kind] += count

    def look(self, **beside: float) -> None:
        """Notes this moment if it is the fullest; `beside`: what lies there for the moment."""
        here = {kind: count + beside.get(kind, 0.0) for kind, count in self.now.items()}
        if sum(here.values()) > sum(self.best.values()):
            self.best = here


def predict(job: Job) -> Memory:
    """The fullest floor's fullest moment. Floors hold ever fewer micro-batches; the first one receives no states, a
    dense layer is lighter than others, and the last floor has the head."""
    cut, dense = cut_in_depth(job.model, job.pp), job.model.first_k_dense_replace
    fuller = next((floor for floor, layers in enumerate(cut) if floor and layers.start >= dense), job.pp - 1)
    floors = sorted({*range(fuller + 1), job.pp - 1} if job.pp > 1 else {0})
    return max((predict_floor(job, floor) for floor in floors), key=lambda memory: memory.total)


def predict_floor(job: Job, floor: int) -> Memory:
    own = held(job.model, job.stage, job.parallel.ep, job.pp, floor)
    phases = {"forward": _forward(job, own), "backward": _backward(job, own), "step": _step(job, own)}
    if job.samples:
        phases["rollout"] = _rollout(job, own)
    sums = {name: sum(tally.best.values()) for name, tally in phases.items()}
    moment = max(sums, key=lambda name: sums[name])
    kinds = phases[moment].best
    outside = GPU_OUTSIDE if job.fused else 0.0
    margin = FRAGMENTATION * sum(kinds.values()) if job.fused else 0.0
    return Memory(kinds, moment, sums, _host(job, own), margin, outside, floor)


def cache_bytes(model: ModelConfig) -> int:
    """Of one token in the sampler's cache, fp32: latents, rope keys and index keys of every layer."""
    row = model.kv_lora_rank + model.qk_rope_head_dim + model.index_head_dim
    return FP32 * model.num_hidden_layers * row


def _rollout(job: Job, own: Held) -> Tally:
    """A sampler in the trainer's process: its cache, and a whole copy of weights that are cut (rl.rollout_copy)."""
    tally = _state(job, own)
    cut = job.parallel.zero == 3 or job.parallel.ep > 1
    if cut and job.ranks > 1:
        tally.add("weights", FP32 * sum(p.size for p in parameters(job.model)))
    tally.add("kv", job.samples * job.seq_len * cache_bytes(job.model))
    tally.look(workspace=GPU_WORKSPACE if job.fused else CPU_WORKSPACE)
    return tally


# What lies there all the time


def _cut(job: Job, own: Held, trains: bool | None = None, group: tuple[bool, ...] | None = None) -> float:
    """Values that a rank keeps of what its ranks share out; experts are on fewer of them."""
    found = 0.0
    for key, size in own.groups.items():
        if (trains is None or key[0] == trains) and (group is None or key == group):
            found += size / (job.ranks / job.parallel.ep if key[3] else job.ranks)
    return found


def _bucket(job: Job, own: Held) -> int:
    return min(MAX_BUCKET, own.sum(trains=True))


def _state(job: Job, own: Held) -> Tally:
    parallel, tally = job.parallel, Tally()
    weights, mine = own.sum(), _cut(job, own, trains=True)
    away = parallel.offload != "none"
    if job.pp > 1:  # train/parallel/zero1.py: weights and gradients whole, the share's gradients beside
        copy = own.copy if job.stage.trains_trunk else 0
        tally.add("weights", FP32 * (weights + own.copy))
        tally.add("gradients", FP32 * (own.sum(trains=True) + copy + mine))
        tally.add("optimiser", 2 * FP32 * mine)
        tally.add("buffers", _received(job, own))
    elif parallel.zero == 0:
        tally.add("weights", FP32 * weights)
        tally.add("optimiser", 2 * FP32 * own.sum(trains=True))
    elif parallel.zero < 3:
        tally.add("weights", FP32 * weights)
        tally.add("optimiser", 0 if away else 3 * FP32 * mine)  # its own copy of the weights, two moments
        tally.add("buffers", FP32 * max(own.largest.values()) if away else 0)
    else:
        tally.add("weights", 0 if parallel.offload_parameters else FP32 * _cut(job, own))
        tally.add("optimiser", 0 if away else 2 * FP32 * mine)
        tally.add("gradients", 0 if away else FP32 * mine)
        tally.add("buffers", FP32 * _bucket(job, own) if mine else 0)
    return tally


def _received(job: Job, own: Held) -> float:
    """torch's pipeline has a buffer for every micro-batch's states, and for every one's gradients coming back. Without
    a backward it keeps instead what went on, until the next step."""
    comes, goes = own.floor > 0, own.floor < job.pp - 1
    return float((comes + goes) * job.sequences * _input_bytes(job))


def _gathered(job: Job, own: Held) -> float:
    """ZeRO-3 keeps what it put together within its window, and the buffer of one gather until all in it were used."""
    if job.parallel.zero < 3:
        return 0.0
    alone = job.ranks == job.parallel.ep  # every expert is on one rank
    whole = sum(size for key, size in own.groups.items() if not (key[3] and alone)) if job.ranks > 1 else 0
    return FP32 * (min(whole, WINDOW + _largest_layer(own)) + min(whole, PREFETCH))


def _largest_layer(own: Held) -> int:
    return max((size for number, size in own.layers.items() if number is not None), default=0)


def _host(job: Job, own: Held) -> float:
    """Of one rank's process: what offload moves there, and a checkpoint in flight (weights and moments)."""
    mine, parallel = _cut(job, own, trains=True), job.parallel
    saving = 3 * FP32 * mine
    moved = {"none": 0.0, "cpu": 4 * FP32 * mine, "nvme": FP32 * mine}[parallel.offload]
    return saving + moved + (FP32 * _cut(job, own) if parallel.offload_parameters else 0.0)


# The walk


@dataclass(frozen=True)
class Block:
    """One layer or head of the walk: what it keeps, what it needs beside in either direction, the values of the
    gradients that its backward makes, and of the largest of them that is not in `backward`."""

    kept: dict[str, int]
    forward: float
    backward: float
    gradients: int
    largest: int = 0
    is_layer: bool = True


def _blocks(job: Job, own: Held) -> list[Block]:
    model, shape = job.model, job.shape
    last = own.floor == job.pp - 1
    found = [
        _layer_block(job, own, number, number >= model.first_k_dense_replace)
        for number in cut_in_depth(model, job.pp)[own.floor]
    ]
    if last and job.stage.lm_loss:
        found.append(_head_block(job, own))
    if last and job.with_mtp:
        entry = activations.mtp_entry(shape)
        found.append(Block(entry, 0.0, 0.0, 0, embedding(model), is_layer=False))
        found.append(_layer_block(job, own, model.num_hidden_layers, True, itemsize=shape.b))
        if job.stage.lm_loss:
            found.append(_head_block(job, own))
    return found


def _layer_block(job: Job, own: Held, number: int, is_moe: bool, itemsize: int = FP32) -> Block:
    model, shape = job.model, job.shape
    n, hidden, b = shape.expert_rows, model.hidden_size, shape.b
    inner = model.moe_intermediate_size if is_moe else model.intermediate_size
    rows = n if is_moe else shape.rows
    heads, latent, width = model.num_attention_heads, model.kv_lora_rank, model.kv_lora_rank + model.qk_rope_head_dim
    workspace = GPU_WORKSPACE if shape.fused else CPU_WORKSPACE
    # gradients of the experts' rows behind the gates, before them and of the gates; inputs of gate and up
    mlp = (3 * FP32 * rows * hidden if is_moe else FP32 * rows * hidden) + 3 * rows * inner * b
    if is_moe and job.parallel.ep > 1:
        mlp += 2 * FP32 * rows * hidden  # sent and received
    narrow = b * shape.experts * hidden * inner if is_moe and shape.narrow else 0  # a gradient before it is widened
    attention = workspace + FP32 * shape.rows * heads * (latent if shape.stage.attention == "sparse" else 0)
    attention += 2 * shape.rows * heads * model.qk_head_dim * b + 2 * FP32 * shape.keys * width
    recorded = replace(shape, stage=RECORDED[shape.stage.attention])
    through = activations.attention(recorded, itemsize)["activations"] + _indexing(job)
    passing = activations.moe(shape) if is_moe else activations.mlp(shape, inner)
    if shape.trunk and not job.checkpointing:
        forward = float(max(_indexing(job), 2 * FP32 * rows * hidden))
    else:
        forward = float(max(through, passing + narrow))
    if is_moe and job.parallel.ep > 1:
        forward += 2 * FP32 * rows * hidden
    backward = float(max(mlp + narrow, attention)) if shape.trunk else 0.0
    kept, largest = activations.layer(shape, is_moe, itemsize), own.largest.get(number, 0)
    return Block(kept, forward, backward, own.layers.get(number, 0), largest)


def _indexing(job: Job) -> int:
    """What a layer's forward needs for its indexer, and the blocks of its attention: queries as they leave the
    projection, rotated, and their gradient; on a CPU the warm-up's blocks are as large as their 64 rows ask for."""
    model, shape, stage = job.model, job.shape, job.stage
    if stage.attention == "dense" and stage.indexer_loss is None:
        return GPU_WORKSPACE if shape.fused else CPU_WORKSPACE
    learns = stage.indexer_loss is not None and stage.trains_indexer
    found = (3 if learns else 2) * FP32 * shape.rows * model.index_n_heads * model.index_head_dim
    if shape.fused:
        return found + GPU_WORKSPACE
    if stage.indexer_loss != "dense":
        return found + CPU_WORKSPACE
    scaled = FP32 * shape.rows * model.num_attention_heads * model.qk_head_dim
    return found + scaled + CPU_ROWS * shape.keys * FP32 * (7 + 2 * model.index_n_heads)


RECORDED = {"dense": STAGES["pretrain"], "sparse": STAGES["grpo"]}  # whose forward a frozen trunk runs unrecorded


def _head_block(job: Job, own: Held) -> Block:
    """Logits exist a tile at a time; its product with the states makes the weight's gradient."""
    model, shape = job.model, job.shape
    words = min(model.vocab_size, max(1, TILE_BYTES // (FP32 * min(TILE_ROWS, shape.rows))))
    tile = FP32 * words * min(TILE_ROWS, shape.rows)
    weight, narrow = FP32 * model.vocab_size * model.hidden_size, model.vocab_size * model.hidden_size * shape.b
    copy = narrow if shape.narrow else 0
    forward = 3 * tile + copy
    backward = 0.0
    if shape.trunk:
        backward = weight + FP32 * words * model.hidden_size + tile + copy + FP32 * shape.rows * model.hidden_size
    kept = {"activations": activations.head(shape)}
    return Block(kept, forward, backward, own.layers.get(None, 0) // 2 if shape.trunk else 0, is_layer=False)


def _in_flight(job: Job, own: Held) -> int:
    """Micro-batches whose activations a floor holds under 1F1B; without a backward there is no second."""
    return min(job.sequences, job.pp - own.floor) if job.shape.trunk else 1


def _input_bytes(job: Job) -> int:
    return FP32 * job.shape.rows * job.model.hidden_size


def _walked(job: Job, own: Held, tally: Tally) -> list[Block]:
    """Adds what a whole forward leaves, noting its fullest moment."""
    blocks, waiting = _blocks(job, own), _in_flight(job, own) - 1
    tally.add("buffers", _gathered(job, own))
    tally.add("activations", (waiting + 1) * activations.shared(job.shape))
    if job.pp > 1 and job.shape.trunk:
        states, comes, goes = _input_bytes(job), own.floor > 0, own.floor < job.pp - 1
        tally.add("activations", (waiting + 1) * (goes - comes) * states)  # what comes in lies in its buffer
        tally.add("buffers", comes * states)  # the gradient that was sent last
    for block in blocks:
        for kind, count in _left(job, block).items():
            tally.add(kind, waiting * count)
    for block in blocks:
        for kind, count in _left(job, block).items():
            tally.add(kind, count)
        tally.look(workspace=block.forward)
    return blocks


def _left(job: Job, block: Block) -> dict[str, float]:
    """What a block leaves for the backward."""
    if job.checkpointing and block.is_layer and job.shape.trunk:
        ready = activations.ready_gradients(job.shape)
        return {"activations": _input_bytes(job), "indexer": ready}
    return dict(block.kept)


def _forward(job: Job, own: Held) -> Tally:
    tally = _state(job, own)
    if job.sequences > 1 and job.pp == 1:
        _earlier_gradients(job, own, tally)
    _walked(job, own, tally)
    return tally


def _earlier_gradients(job: Job, own: Held, tally: Tally) -> None:
    """Of the micro-batches before."""
    if job.parallel.zero < 2:
        tally.add("gradients", FP32 * own.sum(trains=True))
    elif job.parallel.zero == 2:
        tally.add("gradients", FP32 * _cut(job, own, trains=True))


def _backward(job: Job, own: Held) -> Tally:
    tally = _state(job, own)
    if job.sequences > 1 and job.pp == 1:
        _earlier_gradients(job, own, tally)
    blocks = _walked(job, own, tally)
    tally.best = {}
    zero, bucket, made = job.parallel.zero, _bucket(job, own), 0
    accumulates = job.pp > 1 or job.sequences > 1 and zero < 2
    for block in reversed(blocks):
        again: dict[str, float] = {}
        if job.checkpointing and block.is_layer and job.shape.trunk:
            again = {kind: float(count) for kind, count in block.kept.items()}
            again["activations"] -= _input_bytes(job)
            again["indexer"] -= activations.ready_gradients(job.shape)
        tally.look(**again | {"workspace": block.backward + FP32 * (block.largest if accumulates else 0)})
        for kind, count in _left(job, block).items():
            tally.add(kind, -count)
        before, made = made, made + block.gradients
        if zero < 2 and not accumulates:
            tally.add("gradients", FP32 * block.gradients)
        elif zero == 2:
            tally.add("buffers", FP32 * (min(made, bucket) - min(before, bucket)))
    if job.pp > 1:
        _reduction_in_depth(job, own, tally)
    else:
        _reduction(job, own, tally)
    return tally


def _reduction(job: Job, own: Held, tally: Tally) -> None:
    """Behind the walk: gradients leave in flat copies."""
    trained, bucket = own.sum(trains=True), _bucket(job, own)
    if job.parallel.zero == 0:
        tally.now["gradients"] = FP32 * trained
        tally.look(buffers=FP32 * min(trained, FLATTEN))
    elif job.parallel.zero == 1:
        tally.now["gradients"] = FP32 * trained
        tally.look(buffers=FP32 * bucket)
    elif job.parallel.zero == 2:
        tally.now["buffers"] += FP32 * bucket - min(FP32 * bucket, tally.now["buffers"])
        tally.look(buffers=FP32 * bucket, gradients=FP32 * _cut(job, own, trains=True) if trained > bucket else 0)
    else:
        tally.look(buffers=FP32 * bucket if job.ranks > 1 else 0)


def _reduction_in_depth(job: Job, own: Held, tally: Tally) -> None:
    """The embedding's gradient is made whole, and its copy's comes; then one group after the other. gloo sums in a copy
    of what is scattered, and the norm is taken of the share in fp64."""
    model = job.model
    if job.shape.trunk and own.floor == 0:
        tally.look(workspace=FP32 * embedding(model))
    tally.now |= dict.fromkeys(("activations", "indexer", "weight_copies"), 0.0)  # of the others in flight as well
    for key, size in own.groups.items():
        if key[0]:
            tally.look(buffers=0 if job.fused else FP32 * size)
            tally.look(workspace=2 * FP32 * _cut(job, own, group=key))


# The optimiser's step


def _step(job: Job, own: Held) -> Tally:
    """AdamW makes two temporaries of what it steps at a time, on a GPU (foreach) one."""
    parallel, tally = job.parallel, _state(job, own)
    if parallel.offload != "none":
        tally.look(buffers=_gathered(job, own))
        return tally
    temporaries = 1 if job.fused else 2
    trained = own.sum(trains=True)
    parts = [_cut(job, own, group=key) for key in own.groups if key[0]]
    largest = max(parts, default=0.0)
    if job.pp > 1:  # gloo gathers into a buffer of its own
        tally.look(workspace=temporaries * FP32 * largest)
        whole = 0 if job.fused else max((size for key, size in own.groups.items() if key[0]), default=0)
        tally.look(buffers=FP32 * (largest + whole))
    elif parallel.zero == 0:
        tally.add("gradients", FP32 * trained)
        tally.look(workspace=FP32 * (trained if job.fused else 2 * max(own.largest.values())))
    elif parallel.zero < 3:
        tally.add("gradients", FP32 * sum(parts))
        tally.look(gradients=FP32 * largest, workspace=temporaries * FP32 * largest)
    else:
        largest = min(largest, SUB_GROUP)
        tally.look(gradients=FP32 * largest, workspace=temporaries * FP32 * largest)
        tally.look(buffers=_gathered(job, own))
    return tally
