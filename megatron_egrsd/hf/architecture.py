"""The architecture of a model, read from a Hugging Face config.json and checked."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_egrsd.config import ParallelConfig
from megatron_egrsd.errors import BadArgument
from megatron_egrsd.hf.families import Family, family_of
from megatron_egrsd.hf.rope import RopeScaling, read_rope
from megatron_egrsd.system.files import read_json_object


@dataclass(frozen=True)
class Architecture:
    """The family and the sizes that decide every tensor shape; a dense model has `num_experts` 0.

    Family and rope scaling are left out of the text of an Architecture, which is part of a model's fingerprint.
    """

    family: Family = field(repr=False)
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tied_embeddings: bool
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    normalize_expert_weights: bool = True  # over the chosen experts; norm_topk_prob in config.json
    rope_scaling: RopeScaling | None = field(default=None, repr=False)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Architecture":
        """Read `path`/config.json. Raises BadArgument if it is missing, unreadable or not supported."""
        file = Path(path) / "config.json"
        if not Path(path).is_dir():
            raise BadArgument(f"the model directory {path} does not exist; give a local Hugging Face checkpoint")
        if not file.is_file():
            raise BadArgument(f"{path} holds no config.json, so it is not a Hugging Face checkpoint")
        return cls.from_config(read_json_object(file), str(file))

    @classmethod
    def from_config(cls, config: dict, source: str = "config.json") -> "Architecture":
        """Build from a decoded config.json. Raises BadArgument, naming `source`, if it is not supported."""
        family = family_of(config, source)
        rope_theta, rope_scaling = read_rope(config, source, family.rope_theta)
        try:
            experts = _experts(config, source) if family.experts else {}
            return cls(
                family=family,
                vocab_size=config["vocab_size"],
                hidden_size=config["hidden_size"],
                intermediate_size=config["intermediate_size"],
                num_layers=config["num_hidden_layers"],
                num_heads=config["num_attention_heads"],
                num_kv_heads=config["num_key_value_heads"],
                head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                rms_norm_eps=config.get("rms_norm_eps", 1e-6),
                rope_theta=rope_theta,
                rope_scaling=rope_scaling,
                max_position_embeddings=config["max_position_embeddings"],
                tied_embeddings=bool(config.get("tie_word_embeddings", False)),
                **experts,
            )
        except KeyError as error:
            raise BadArgument(f"{source} lacks the key {error}") from None

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Return the embedding's rows over all tensor-parallel ranks: a multiple of 8 rows a rank.

        Eight rows keep every shard's logits on 16-byte boundaries in bf16; 151,936 then needs no padding up to TP 16.
        """
        unit = 8 * tensor_parallel
        return -(-self.vocab_size // unit) * unit

    def check_parallel(self, parallel: ParallelConfig) -> None:
        """Raise BadArgument if the model cannot be trained in the layout `parallel`."""
        tensor, pipeline, expert = parallel.tensor, parallel.pipeline, parallel.expert
        if self.num_experts and tensor > 1 and not parallel.sequence_parallel:
            raise BadArgument(
                f"parallel.tensor = {tensor} with a mixture of experts needs parallel.sequence_parallel true, which "
                "megatron-core's token dispatcher relies on"
            )
        if max(1, self.num_experts) % expert:
            has = f"{self.num_experts} experts" if self.num_experts else "no experts"
            raise BadArgument(f"parallel.expert = {expert}, but the model has {has} to divide over as many ranks")
        split = {"attention heads": self.num_heads, "key/value heads": self.num_kv_heads}
        if not self.num_experts:
            split["rows of the MLP"] = self.intermediate_size
        for name, size in split.items():
            shared = name == "key/value heads" and tensor % size == 0  # several ranks compute with the same head
            if size % tensor and not shared:
                raise BadArgument(f"parallel.tensor = {tensor} does not divide the model's {size} {name}")
        if sum(parallel.layers_of_chunks(self.num_layers)) != self.num_layers:
            chunks = f" x parallel.virtual_pipeline = {parallel.interleaved}" if parallel.interleaved else ""
            wrong = f"parallel.pipeline = {pipeline}{chunks} does not divide the model's {self.num_layers} layers"
            if parallel.pipeline_layout:
                held = f"parallel.pipeline_layout holds {sum(parallel.pipeline_layout)} layers"
                wrong = f"{held}, but the model has {self.num_layers}"
            if parallel.layer_chunks > self.num_layers:
                raise BadArgument(f"{wrong}; set fewer stages")
            fitting = self.balanced_layers(parallel.layer_chunks)
            raise BadArgument(f"{wrong}; parallel.pipeline_layout {fitting} fits")

    def balanced_layers(self, chunks: int) -> list[int]:
        """Return layers for each of `chunks` parts, so that the slowest computes least: the last has the LM head too.

        The embedding is a look-up and counts nothing. Among equally fast divisions the most even one is returned. If
        parts still differ, later parts hold more: their stages keep fewer micro-batches.
        """
        if chunks == 1:
            return [self.num_layers]
        head = self.vocab_size * self.hidden_size / self._layer_parameters(self.experts_per_token)

        def slowest(last: int) -> tuple[float, int]:
            most = -(-(self.num_layers - last) // (chunks - 1))
            return max(most, last + head), -last

        last = min(range(1, self.num_layers - chunks + 2), key=slowest)
        each, more = divmod(self.num_layers - last, chunks - 1)
        return [*[each] * (chunks - 1 - more), *[each + 1] * more, last]

    def kv_cache_bytes(self, itemsize: int, tensor: int = 1) -> int:
        """Return the bytes of a token's keys and values on each of `tensor` GPUs, `itemsize` bytes an element."""
        return 2 * self.num_layers * max(1, self.num_kv_heads // tensor) * self.head_dim * itemsize

    @property
    def num_parameters(self) -> int:
        """Number of parameters. Tied embeddings count once, padding does not count."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + self.num_layers * self._layer_parameters(self.num_experts) + self.hidden_size

    def _layer_parameters(self, experts: int) -> int:
        """Return the parameters of a layer; of a mixture, with `experts` experts and their rows of the router."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        if self.family.qk_norm:
            attention += 2 * self.head_dim
        if self.family.qkv_bias:
            attention += (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        mlp = 3 * self.hidden_size * self.intermediate_size
        if self.num_experts:
            mlp = experts * self.hidden_size * (3 * self.expert_intermediate_size + 1)
        return attention + mlp + 2 * self.hidden_size


def _experts(config: dict, source: str) -> dict:
    """Return the fields of a mixture of experts. Raises BadArgument if some layers would be dense."""
    if config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers"):
        raise BadArgument(f"{source} mixes dense and expert layers, which is not supported")
    return {
        # transformers 5 renames it when it saves
        "num_experts": config["num_local_experts" if "num_local_experts" in config else "num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_intermediate_size": config["moe_intermediate_size"],
        "normalize_expert_weights": bool(config.get("norm_topk_prob", False)),
    }
